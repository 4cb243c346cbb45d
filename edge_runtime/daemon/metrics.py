"""A device's health as Prometheus metrics.

Import this module only where it is used: the Prometheus client takes 12 MB of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import Activity, Health
from fedfmsl.transport.address import listening_on, why_not_listening

# Metrics with one value: name, field of Health, description.
GAUGES = (
    ("start_time_seconds", "started", "Unix time of the daemon's start."),
    ("health_timestamp_seconds", "time", "Unix time of the last heartbeat."),
    ("round", "round", "The newest announced round."),
    ("level", "level", "The SAL level of the newest announced round."),
    ("level_cap", "level_cap", "The highest SAL level that the device trains now."),
    ("step_slowdown_ratio", "slowdown", "Duration of a training step divided by its duration in the probe."),
    ("temperature_celsius", "temperature", "The highest temperature of the used thermal zones."),
    ("other_processes_cpu_ratio", "others", "Share of all processors that other processes use."),
    ("on_battery", "on_battery", "1 if only a battery powers the device."),
    ("metered", "metered", "1 if the network is metered."),
    ("throttled", "throttled", "1 if the processor is throttled."),
    ("resident_memory_bytes", "memory", "Resident memory of the daemon."),
    ("disk_free_bytes", "disk_free", "Free space on the disk of the state directory."),
    ("feature_cache_bytes", "cache", "Disk space of the feature cache."),
    ("certificate_expiry_timestamp_seconds", "certificate_until", "Unix time when the device's certificate expires."),
    (
        "broker_certificate_expiry_timestamp_seconds",
        "broker_certificate_until",
        "Unix time when the broker's certificate expires.",
    ),
    ("unacknowledged_updates", "unacknowledged", "Updates that the server has not acknowledged."),
)
SPLITS = ("train", "held_out", "test", "skipped")


def serve_metrics(address: str, newest: Callable[[], Health | None], insecure: bool = False) -> None:
    """Serves the newest Health on HOST:PORT, from its own threads, until the process ends.

    Raises ConfigError if the address is invalid or in use, or if other machines reach it and `insecure` is not set.
    """
    host, port = listening_on(address, f"what --metrics {address} serves", insecure)
    registry = CollectorRegistry()
    registry.register(_Newest(newest))
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"--metrics {address} cannot be listened on ({why_not_listening(host, error)}); choose another"
        ) from error


class _Newest(Collector):
    def __init__(self, newest: Callable[[], Health | None]) -> None:
        self._newest = newest

    def describe(self) -> list[Metric]:
        """The metrics are not known when the collector is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        health = self._newest()
        return iter(()) if health is None else families(health)


def families(health: Health) -> Iterator[Metric]:
    """Unknown values are left out."""
    about = {"device": health.device, "version": health.version, "board": health.board}
    info = GaugeMetricFamily("fedfmsl_info", "The device, its version and board.", labels=list(about))
    info.add_metric(list(about.values()), 1)
    yield info
    activity = GaugeMetricFamily(
        "fedfmsl_activity", "1 for the current activity, 0 for the others.", labels=["activity"]
    )
    for each in Activity:
        activity.add_metric([each.value], float(each is health.activity))
    yield activity
    samples = GaugeMetricFamily("fedfmsl_samples", "Samples on the device by split.", labels=["split"])
    for name in SPLITS:
        samples.add_metric([name], getattr(health, name))
    yield samples
    yield CounterMetricFamily("fedfmsl_rounds", "Rounds completed since the start.", value=health.rounds_done)
    for name, field, text in GAUGES:
        value = getattr(health, field)
        if value is not None:
            yield GaugeMetricFamily(f"fedfmsl_{name}", text, value=value)
