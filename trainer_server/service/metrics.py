"""The server's figures as Prometheus metrics.

Import this module only where it is used: the Prometheus client takes 12 MB of memory. Labels have few values: there are
none with names of devices, which `python -m trainer_server status` shows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.metadata import version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from fedfmsl.protocol.messages import Stage
from fedfmsl.transport.metrics import by_label, info, one_of
from trainer_server.coordinator.privacy_budget import privacy_budget
from trainer_server.service.figures import Snapshot

PREFIX = "fedfmsl_server"


def families(now: Snapshot) -> Iterator[Metric]:
    """Unknown values are left out. Counters start with the server's process."""
    plan, state, figures = now.plan, now.state, now.figures
    about = {
        "run": plan.config.run,
        "session": plan.session,
        "model": plan.bundle.manifest.model,
        "version": version("fedfmsl-edge"),
    }
    yield info(f"{PREFIX}_info", "The run, its session, the model and the server's version.", about)
    yield _gauge("start_time_seconds", "Unix time of the server's start.", figures.started)
    announced = state.announced
    stage = announced.stage.value if announced else None
    text = "1 for the stage of the present round, 0 for the others."
    yield one_of(f"{PREFIX}_stage", text, "stage", [each.value for each in Stage], stage)
    yield _gauge("round", "The newest announced round.", state.round)
    if announced:
        yield _gauge("level", "The SAL level of the present round.", announced.level)
    yield _gauge("paused", "1 if the operator has paused the run.", state.paused_at is not None)
    yield _gauge("resting", "1 if the run rests, outside of the hours of --schedule.", state.rests_at is not None)
    yield _gauge("waiting", "1 if the run waits, because too few devices can answer a round.", state.waiting)
    yield from _participation(now)
    yield from _rounds(now)
    yield _gauge("connected", "1 if the server is connected to the broker.", now.connected)
    yield _gauge("queued_messages", "Messages that wait for the server.", now.queued)
    yield _gauge("incomplete_uploads", "Devices of whose updates some chunks are missing.", now.uploads)
    yield _gauge("disk_free_bytes", "Free space on the disk of the run's folder.", shutil.disk_usage(now.folder).free)
    if now.certificate_until:
        name, text = "certificate_expiry_timestamp_seconds", "Unix time when the server's certificate expires."
        yield _gauge(name, text, now.certificate_until)
    if now.broker_certificate_until:
        name, text = "broker_certificate_expiry_timestamp_seconds", "Unix time when the broker's certificate expires."
        yield _gauge(name, text, now.broker_certificate_until)
    yield from _privacy(now)


def _privacy(now: Snapshot) -> Iterator[Metric]:
    config, state, figures = now.plan.config, now.state, now.figures
    if config.privacy is None:
        return
    by_observer = privacy_budget(config, figures.noised, state.announced, bool(state.updates))
    text = "The privacy budget that the run has used at its delta, by observer."
    yield by_label(GaugeMetricFamily(f"{PREFIX}_epsilon", text, labels=["observer"]), by_observer)
    yield _gauge("delta", "The delta of the privacy budget.", config.delta)


def _participation(now: Snapshot) -> Iterator[Metric]:
    state = now.state
    counts = {
        "known": len(state.devices),
        "online": len(state.online),
        "ready": len(state.ready),
        "selected": len(state.expected),
        "answered": len(state.answered & state.expected),
        "missing": len(state.awaited - state.answered),
        "excluded": len(state.excluded),
    }
    text = (
        "Devices: known, online, ready (not paused), excluded by the operator; of the present round selected, "
        "answered, missing."
    )
    yield by_label(GaugeMetricFamily(f"{PREFIX}_devices", text, labels=["state"]), counts)


def _rounds(now: Snapshot) -> Iterator[Metric]:
    figures = now.figures
    text = "Rounds that are closed, or failed and are repeated."
    yield by_label(CounterMetricFamily(f"{PREFIX}_rounds", text, labels=["result"]), figures.rounds)
    yield SummaryMetricFamily(
        f"{PREFIX}_round_seconds", "How long rounds were open.", figures.closings, figures.round_seconds
    )
    text = "Time to aggregate a round, to store it and to prepare the next one."
    yield SummaryMetricFamily(f"{PREFIX}_aggregation_seconds", text, figures.closings, figures.closing_seconds)
    yield CounterMetricFamily(f"{PREFIX}_updates", "Updates in closed rounds.", figures.updates)
    yield CounterMetricFamily(
        f"{PREFIX}_stragglers", "Selected devices without an update when their round closed.", figures.stragglers
    )
    yield CounterMetricFamily(f"{PREFIX}_update_bytes", "Bytes of the updates in closed rounds.", figures.bytes_up)
    text = "Refused messages, by reason."
    yield by_label(CounterMetricFamily(f"{PREFIX}_refused_messages", text, labels=["reason"]), dict(figures.refused))
    text = "Mean held-out accuracy of the devices in the last round that measured it, by model."
    yield by_label(
        GaugeMetricFamily(f"{PREFIX}_held_out_accuracy_ratio", text, labels=["model"]), dict(figures.held_out)
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)
