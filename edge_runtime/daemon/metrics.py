"""How a device is, for Prometheus. To be imported only where that is wanted: its client takes 12 MB of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import Activity, Health
from fedfmsl.transport.address import listening_on

# Of what is one number: its name, the field of Health, and what it is.
GAUGES = (
    ("start_time_seconds", "started", "When the daemon was started, in unix seconds."),
    ("heard_time_seconds", "time", "When the daemon last looked after itself, in unix seconds."),
    ("round", "round", "The newest round that was announced."),
    ("level", "level", "The SAL level of that round."),
    ("level_cap", "level_cap", "The highest SAL level that this device trains at present."),
    ("step_slowdown_ratio", "slowdown", "How much longer a training step takes than when it was measured."),
    ("temperature_celsius", "temperature", "The hottest of the thermal zones that count."),
    ("others_processor_ratio", "others", "Share of all processors that other processes use."),
    ("on_battery", "on_battery", "1 if nothing but a battery feeds the device."),
    ("metered", "metered", "1 if the network costs by the byte."),
    ("throttled", "throttled", "1 if the processor is kept from its full speed."),
    ("resident_memory_bytes", "memory", "Memory that the daemon takes."),
    ("disk_free_bytes", "disk_free", "Free space on the disk of its state."),
    ("feature_cache_bytes", "cache", "Disk that cached features take."),
    ("unacknowledged_updates", "unacknowledged", "Updates that the server has not answered yet."),
)
SLICES = ("train", "held_out", "test", "skipped")


def serve_metrics(address: str, newest: Callable[[], Health | None], insecure: bool = False) -> None:
    """Answers on HOST:PORT, from threads of its own, with the newest Health as long as the process lives.

    Raises ConfigError if that is no address, is taken, or is one that others reach, unless that is `insecure`.
    """
    host, port = listening_on(address, f"what --metrics {address} tells", insecure)
    registry = CollectorRegistry()
    registry.register(_Newest(newest))
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(f"--metrics {address} cannot be listened on ({error}); choose another port") from error


class _Newest(Collector):
    def __init__(self, newest: Callable[[], Health | None]) -> None:
        self._newest = newest

    def describe(self) -> list[Metric]:
        """Nothing is known by the time it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        health = self._newest()
        return iter(()) if health is None else families(health)


def families(health: Health) -> Iterator[Metric]:
    """What is not known is left out."""
    about = {"device": health.device, "version": health.version, "board": health.board}
    info = GaugeMetricFamily("fedfmsl_info", "What the daemon is.", labels=list(about))
    info.add_metric(list(about.values()), 1)
    yield info
    activity = GaugeMetricFamily("fedfmsl_activity", "1 for what it is doing, 0 for all else.", labels=["activity"])
    for each in Activity:
        activity.add_metric([each.value], float(each is health.activity))
    yield activity
    samples = GaugeMetricFamily("fedfmsl_samples", "Samples on the device, by the slice they are in.", labels=["slice"])
    for name in SLICES:
        samples.add_metric([name], getattr(health, name))
    yield samples
    yield CounterMetricFamily("fedfmsl_rounds", "Rounds done since the start.", value=health.rounds_done)
    for name, field, text in GAUGES:
        value = getattr(health, field)
        if value is not None:
            yield GaugeMetricFamily(f"fedfmsl_{name}", text, value=value)
