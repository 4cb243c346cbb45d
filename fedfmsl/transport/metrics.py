"""Prometheus metrics over HTTP, of a device and of the server.

Import this module only where it is used: the Prometheus client takes 12 MB of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedfmsl.transport.address import require_loopback
from fedfmsl.transport.listening import cannot_listen, parse_listen

Collect = Callable[[], Iterable[Metric]]
Labelled = GaugeMetricFamily | CounterMetricFamily


def serve_metrics(address: str, collect: Collect, insecure: bool = False) -> None:
    """Serves what `collect` gives on HOST:PORT, from its own threads, until the process ends.

    Raises ConfigError if the address is invalid, or if other machines reach it and `insecure` is not set, and RunError
    if it cannot be listened on.
    """
    host, port = parse_listen(address)
    if not insecure:
        require_loopback(f"what --metrics {address} serves", host, "let it listen on 127.0.0.1")
    registry = CollectorRegistry()
    registry.register(_Newest(collect))
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise cannot_listen("--metrics", host, port, error) from error


class _Newest(Collector):
    def __init__(self, collect: Collect) -> None:
        self._collect = collect

    def describe(self) -> list[Metric]:
        """The metrics are not known when the collector is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def info(name: str, text: str, about: Mapping[str, str]) -> Metric:
    """A metric that is 1, with facts as labels."""
    metric = GaugeMetricFamily(name, text, labels=list(about))
    metric.add_metric(list(about.values()), 1)
    return metric


def one_of(name: str, text: str, label: str, values: Iterable[str], current: str | None) -> Metric:
    """A metric that is 1 for the current value of a label, 0 for the others."""
    metric = GaugeMetricFamily(name, text, labels=[label])
    for value in values:
        metric.add_metric([value], float(value == current))
    return metric


def by_label(metric: Labelled, counts: Mapping[str, float]) -> Metric:
    """The metric, which has one label, with a value for each of the label's values."""
    for value, count in counts.items():
        metric.add_metric([value], count)
    return metric
