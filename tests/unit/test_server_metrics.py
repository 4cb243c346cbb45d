"""What Prometheus reads of a server, and the Grafana dashboard that shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from support.bundles import Built
from support.coordinators import ABC, MEAN, PRIVACY, CoordinatorRun, started
from support.tools import NOT_TESTED

from edge_runtime.daemon import metrics as device_metrics
from fedfmsl.algorithms.accounting import Observer, epsilons
from fedfmsl.algorithms.sal import FixedSchedule, Sal
from fedfmsl.protocol.messages import Activity, Health, Stage
from trainer_server.coordinator.events import StoreRound
from trainer_server.service.figures import Figures, Snapshot
from trainer_server.service.metrics import families

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
EVERY_STAGE = {stage.value for stage in Stage}


def scrape(metrics: Iterator[Metric]) -> str:
    class Once(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from found

    found, registry = list(metrics), CollectorRegistry()
    registry.register(Once())
    return generate_latest(registry).decode()


def values(text: str) -> dict[tuple[str, frozenset[str]], float]:
    """By name and label values."""
    found = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {
        (sample.name.removeprefix("fedfmsl_server_"), frozenset(sample.labels.values())): sample.value
        for sample in found
    }


@pytest.fixture
def run(vit: Built) -> CoordinatorRun:
    """A private run after its round of statistics, in which one of three devices has answered the next round."""
    rule = Sal(FixedSchedule(), max_level=2)
    run = started(vit, ABC, privacy=PRIVACY, aggregation=MEAN, stage1_sal=rule, stage2_sal=rule)
    run.answers(ABC)
    run.answers(ABC[:1])
    return run


def snapshot(run: CoordinatorRun, figures: Figures, folder: Path) -> Snapshot:
    for command in run.of(StoreRound):
        figures.closed(command.closed, seconds=0.25)
    return Snapshot(
        run.plan, run.state, figures, folder, queued=7, uploads=2, certificate_until=9e9, broker_certificate_until=8e9
    )


def test_prometheus_reads_where_the_run_stands(run: CoordinatorRun, tmp_path: Path) -> None:
    figures = Figures()
    figures.refused["flood"] = 3
    found = values(scrape(families(snapshot(run, figures, tmp_path))))

    def value(name: str, *labels: str) -> float:
        return found[name, frozenset(labels)]

    stages = {name for name in EVERY_STAGE if value("stage", name)}
    assert stages == {"global"}
    assert (value("round"), value("level")) == (2, 1)
    states = {name: value("devices", name) for name in ("online", "selected", "answered", "missing")}
    assert states == {"online": 3, "selected": 3, "answered": 1, "missing": 2}
    assert (value("rounds_total", "closed"), value("rounds_total", "repeated")) == (1, 0)
    assert (value("updates_total"), value("update_bytes_total"), value("stragglers_total")) == (3, 30, 0)
    assert (value("aggregation_seconds_sum"), value("aggregation_seconds_count")) == (0.25, 1)
    assert value("refused_messages_total", "flood") == 3
    assert value("held_out_accuracy_ratio", "global") == 0.5
    spent = {observer.value: value("epsilon", observer.value) for observer in Observer}
    expected = epsilons(PRIVACY, 1, run.plan.config.delta, updates=2)  # the server has seen one of the present round
    assert spent == {observer.value: epsilon for observer, epsilon in expected.items()}
    assert (value("queued_messages"), value("incomplete_uploads")) == (7, 2)
    assert value("certificate_expiry_timestamp_seconds") == 9e9


def test_no_device_can_add_a_label(run: CoordinatorRun, tmp_path: Path) -> None:
    """Names of metrics are the device's own."""
    run.answers(ABC[1:], metrics={"held_out_x9": 0.1})
    text = scrape(families(snapshot(run, Figures(), tmp_path)))
    assert "x9" not in text
    assert not re.search(r'"[abc]"', text)


def everything(run: CoordinatorRun, folder: Path) -> str:
    """All metrics of a device and a server."""
    figures = Figures()
    figures.refused["flood"] = 3
    known = {**dict.fromkeys(Health.model_fields, 1), **dict.fromkeys(("device", "version", "board"), "a")}
    device = scrape(device_metrics.families(Health.model_construct(None, **{**known, "activity": Activity.WAITING})))
    return device + scrape(families(snapshot(run, figures, folder)))


@pytest.mark.skipif(shutil.which("promtool") is None, reason=f"{NOT_TESTED}promtool is not installed")
def test_promtool_finds_nothing_to_complain_of(run: CoordinatorRun, tmp_path: Path) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=everything(run, tmp_path), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_dashboard_asks_for_metrics_and_labels_that_exist(run: CoordinatorRun, tmp_path: Path) -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    samples = [s for family in text_string_to_metric_families(everything(run, tmp_path)) for s in family.samples]
    known: dict[str, list[Mapping[str, str]]] = {}
    for sample in samples:
        known.setdefault(sample.name, []).append(sample.labels)
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    expressions += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert len(expressions) > 30
    for expression in expressions:
        names = re.findall(r"\bfedfmsl_\w+", expression)
        assert names and set(names) <= set(known), expression
        for label, wanted in re.findall(r'\b(\w+)=~?"([^"$]+)"', expression):
            assert {*wanted.split("|")} <= {labels[label] for labels in known[names[0]]}, expression
    for panel in panels:
        for target in panel["targets"]:
            (name, *_) = re.findall(r"\bfedfmsl_\w+", target["expr"])
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"instance"}  # Prometheus adds it
            assert all(shown <= set(labels) for labels in known[name]), target
