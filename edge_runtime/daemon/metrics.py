"""A device's health as Prometheus metrics.

Import this module only where it is used: the Prometheus client takes 12 MB of memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedfmsl.protocol.messages import Activity, Health
from fedfmsl.transport.metrics import by_label, info, one_of

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
    ("epsilon", "epsilon", "The privacy budget that all runs have used, at a delta of 1e-5."),
    ("unacknowledged_updates", "unacknowledged", "Updates that the server has not acknowledged."),
)
SPLITS = ("train", "held_out", "test", "skipped")


def families(health: Health | None) -> Iterator[Metric]:
    """The metrics of the newest health. Unknown values are left out, and everything before the first health."""
    if health is None:
        return
    about = {"device": health.device, "version": health.version, "board": health.board}
    yield info("fedfmsl_info", "The device, its version and board.", about)
    activities = [each.value for each in Activity]
    text = "1 for the current activity, 0 for the others."
    yield one_of("fedfmsl_activity", text, "activity", activities, health.activity.value)
    samples = GaugeMetricFamily("fedfmsl_samples", "Samples on the device by split.", labels=["split"])
    yield by_label(samples, {name: getattr(health, name) for name in SPLITS})
    yield CounterMetricFamily("fedfmsl_rounds", "Rounds completed since the start.", value=health.rounds_done)
    for name, field, text in GAUGES:
        value = getattr(health, field)
        if value is not None:
            yield GaugeMetricFamily(f"fedfmsl_{name}", text, value=value)
