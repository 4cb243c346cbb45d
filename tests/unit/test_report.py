"""A trial's report from the records of a run, with numbers computed by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.bundles import LAYERS, Built

from devices.trial import report as report_module
from devices.trial.evaluation import ByModel, FleetEvaluation
from devices.trial.report import build_report, write_report
from fedfmsl.algorithms.evaluation import DeviceAccuracy
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.errors import RunError
from fedfmsl.protocol.bundle import MANIFEST
from fedfmsl.protocol.messages import Round, Stage, Training, Update
from fedfmsl.protocol.task import TASK, Task
from trainer_server.config import RunConfig
from trainer_server.coordinator.records import ClosedRound
from trainer_server.storage.origin import Origin
from trainer_server.storage.run_store import RunStore

SECONDS = {"export": 30.0, "fleet_evaluation": 3.0, "total": 100.0}
KEYS = {
    *("seed", "alpha", "devices", "classes", "model", "rounds", "seconds", "accuracy", "accuracy_global_test", "gate"),
    *("accuracy_fleet", "accuracy_novel", "accuracy_stream", "harmonic", "worst_decile", "unseen", "missing"),
    *("levels", "tuned_share", "tuned_parameters", "backbone_parameters"),
    *("bytes_up_per_device_round", "bytes_down_per_device_round", "device_peak_rss_mb"),
}
GATE = {"mean_local_weight": 0.5, "gate_entropy": 0.6}


def update(device: str, stage: Stage, samples: int, **fields: Any) -> Update:
    return Update(run="run", session="one", round=1, device=device, stage=stage, level=1, samples=samples, **fields)


def closed(stage: Stage, *updates: Update, index: int = 0, level: int = 1, **fields: Any) -> ClosedRound:
    announced = Round(
        run="run",
        session="one",
        round=1,
        stage=stage,
        index=index,
        of=2,
        level=level,
        training=Training(epochs=1, learning_rate=0.1),
        sal=Sal(CapabilityQueue(2, 0.1), max_level=3),
    )
    sizes = {u.device: 1000 * (place + 1) for place, u in enumerate(updates)}
    defaults: dict[str, Any] = {"seconds": 2.0, "bytes_up": sizes, "missing": ()}
    return ClosedRound(round=announced, updates={u.device: u for u in updates}, **{**defaults, **fields})


def trained(index: int, level: int, **fields: Any) -> ClosedRound:
    metrics = {"held_out_global": 0.5}
    both = (update(name, Stage.GLOBAL, 8, metrics=metrics, bytes_down=4000, peak_rss_mb=90.0) for name in ("a", "b"))
    return closed(Stage.GLOBAL, *both, index=index, level=level, **fields)


def personalized(**fields: Any) -> ClosedRound:
    metrics = {"held_out_mofm": 0.75, "held_out_local": 0.5, "held_out_global_prior": 0.5, "local_level": 2.0}
    both = (update(name, Stage.PERSONAL, 4, metrics=metrics, bytes_down=1000) for name in ("a", "b"))
    return closed(Stage.PERSONAL, *both, **fields)


def evaluated(baseline: bool = True) -> ClosedRound:
    """Device a has 3 test images of class 0 and one of class 1, b has 12 of class 1, c none."""
    alone = {"local_only": 0.25} if baseline else {}
    of_a = {"start": 0.5, "global": 0.75, "global_prior": 0.75, "local_expert": 1.0, "mofm": 1.0, **alone}
    of_b = {"start": 0.5, "global": 0.25, "global_prior": 0.5, "local_expert": 0.5, "mofm": 0.75, **alone}
    of_c = dict.fromkeys(of_a, 0.0)
    return closed(
        Stage.EVALUATE,
        update(
            "a",
            Stage.EVALUATE,
            4,
            metrics={**of_a, "mean_local_weight": 0.8, "gate_entropy": 0.2},
            counts={"test": [3, 1, 0], "start": [2, 0, 0], "global": [3, 0, 0]},
            peak_rss_mb=120.0,
        ),
        update(
            "b",
            Stage.EVALUATE,
            12,
            metrics={**of_b, **GATE},
            counts={"test": [0, 12, 0], "start": [0, 6, 0], "global": [0, 3, 0]},
            peak_rss_mb=110.0,
        ),
        update("c", Stage.EVALUATE, 0, metrics={**of_c, **GATE}, counts={name: [0, 0, 0] for name in ("test", *of_c)}),
        seconds=5.0,
    )


def whole_run(baseline: bool = True) -> list[ClosedRound]:
    start = closed(Stage.STATISTICS, update("a", Stage.STATISTICS, 8), update("b", Stage.STATISTICS, 8), seconds=7.0)
    alone = [closed(Stage.BASELINE, update("a", Stage.BASELINE, 8), seconds=9.0)] if baseline else []
    head = closed(Stage.HEAD, *(update(name, Stage.HEAD, 8, bytes_down=4000) for name in ("a", "b")), seconds=1.5)
    return [start, trained(0, 1), trained(1, 2), head, personalized(), *alone, evaluated(baseline)]


def fleet_accuracies(baseline: bool = True) -> ByModel:
    """Of the 16 test images, 12 are novel to device a, and 3 to b."""
    models = ["start", "global", "global_prior", "local_expert", "mofm"] + ["local_only"] * baseline
    of_a = DeviceAccuracy(0.75, 4, 0.375, 16, 0.25, 12, {0.0: 0.75, 0.1: 0.7, 0.5: 0.5})
    of_b = DeviceAccuracy(0.25, 12, 0.5, 16, 1.0, 3, {0.0: 0.25, 0.1: 0.325, 0.5: 0.625})
    return {model: {"a": of_a, "b": of_b} for model in models}


def nothing_novel() -> ByModel:
    """Both devices hold every class."""
    found = {"a": DeviceAccuracy(0.75, 4, 0.5, 16, None, 0, {0.0: 0.75})}
    return dict.fromkeys(fleet_accuracies(), found)


FLEET = FleetEvaluation(fleet_accuracies(), {})


@pytest.fixture
def folder(vit: Built, tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    for name in (MANIFEST, TASK):
        shutil.copy(vit.bundle.root / name, tmp_path / "bundle")
    return tmp_path


@pytest.fixture
def no_png(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that do not look at report.png, which takes a second."""
    monkeypatch.setattr(report_module, "png", lambda data: b"")


def record(folder: Path, rounds: list[ClosedRound]) -> None:
    sal = Sal(CapabilityQueue(2, 0.02), max_level=LAYERS)
    config = RunConfig(run="r", devices=2, stage1_sal=sal, stage2_sal=sal)
    task = Task("f" * 64, ("apple", "pear"))
    origin = Origin(config=config, session="s", bundle=folder / "bundle", sha256=task.bundle, task=task.sha256)
    store = RunStore.create(folder, origin, task)
    numbered = [(one, one.round.model_copy(update={"round": number})) for number, one in enumerate(rounds, start=1)]
    store.commit([], [one.model_copy(update={"round": round_}) for one, round_ in numbered])


def report_of(built: Built, rounds: list[ClosedRound], evaluation: FleetEvaluation = FLEET) -> dict[str, Any]:
    return build_report(rounds, built.bundle, evaluation, 3, 0.5, SECONDS)


def test_the_numbers_are_those_of_the_last_evaluation(vit: Built) -> None:
    report = report_of(vit, whole_run())
    assert report.keys() >= KEYS
    assert (report["seed"], report["alpha"], report["devices"], report["classes"]) == (3, 0.5, 3, 4)
    assert report["rounds"] == {"stage1": 2, "stage2": 1}
    assert report["levels"] == [1, 2]
    assert report["accuracy"]["global"] == {"mean": 0.375, "per_device": {"a": 0.75, "b": 0.25}}
    assert report["accuracy"]["mofm"] == {"mean": 0.8125, "per_device": {"a": 1.0, "b": 0.75}}
    assert report["gate"] == {"mean_local_weight": 0.575, "entropy": 0.5}


def test_own_novel_fleet_and_streams_are_means_over_the_devices_samples(vit: Built) -> None:
    report = report_of(vit, whole_run())
    assert report["accuracy_novel"]["mofm"] == {"mean": 0.4, "per_device": {"a": 0.25, "b": 1.0}}
    assert report["accuracy_fleet"]["mofm"] == {"mean": 0.4375, "per_device": {"a": 0.375, "b": 0.5}}
    assert report["accuracy_stream"]["mofm"] == {"0": 0.375, "0.1": 0.41875, "0.5": 0.59375}
    assert report["harmonic"]["mofm"] == pytest.approx(2 * 0.375 * 0.4 / 0.775, abs=1e-6)
    assert report["worst_decile"]["mofm"] == 0.25
    assert report["unseen"] is None


@pytest.mark.usefixtures("no_png")
def test_unseen_devices_are_reported_apart(vit: Built, folder: Path) -> None:
    kept_out = {"global": {"c": DeviceAccuracy(0.5, 4, 0.6, 20, 0.7, 8, {0.0: 0.5, 0.1: 0.52, 0.5: 0.6})}}
    evaluation = FleetEvaluation(fleet_accuracies(), kept_out)
    report = report_of(vit, whole_run(), evaluation)
    assert report["unseen"]["accuracy"] == {"global": {"mean": 0.5, "per_device": {"c": 0.5}}}
    assert report["unseen"]["accuracy_novel"]["global"]["mean"] == 0.7
    assert "c" not in report["accuracy_fleet"]["global"]["per_device"]
    record(folder, whole_run())
    write_report(folder, evaluation, seed=0, alpha=0.5, seconds=SECONDS, used=60, skipped=0)
    assert "did not take part: c." in (folder / "report.html").read_text()


@pytest.mark.usefixtures("no_png")
def test_where_every_device_holds_every_class_nothing_is_novel(vit: Built, folder: Path) -> None:
    evaluation = FleetEvaluation(nothing_novel(), {})
    report = report_of(vit, whole_run(), evaluation)
    assert report["accuracy_novel"]["mofm"] == {"mean": None, "per_device": {"a": None}}
    assert report["accuracy_stream"]["mofm"] == {"0": 0.75}
    assert report["harmonic"]["mofm"] is None
    record(folder, whole_run())
    write_report(folder, evaluation, seed=0, alpha=0.5, seconds=SECONDS, used=60, skipped=0)
    assert "own test photos correctly" in (folder / "report.html").read_text()  # the first picture has no novel axis


@pytest.mark.usefixtures("no_png")
def test_the_first_picture_and_the_table_show_own_against_novel(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(folder, whole_run())
    write_report(folder, FLEET, seed=0, alpha=0.5, seconds=SECONDS, used=30, skipped=60)
    page = (folder / "report.html").read_text()
    assert 'alt="MoFM knows 81% of a device&#x27;s own photos, 40% of novel ones"' in page[: page.index("</div>")]
    printed = capsys.readouterr().out.splitlines()
    head = next(line for line in printed if line.startswith("model "))
    assert head.split()[:5] == ["model", "own", "novel", "fleet", "harmonic"]
    assert "30 of 90 photos were used, 60 were skipped" in printed
    assert "30 of 90 photos were used, 60 were skipped" in page
    mofm = next(line for line in printed if line.startswith("MoFM"))
    assert mofm.split()[1:4] == ["81.2%", "40.0%", "43.8%"]


def test_the_global_test_is_class_balanced(vit: Built) -> None:
    expected = {"start": (2 / 3 + 6 / 13) / 2, "global": (3 / 3 + 3 / 13) / 2}
    assert report_of(vit, whole_run())["accuracy_global_test"] == pytest.approx(expected, abs=1e-6)


def test_costs_are_per_device_and_round_of_both_stages(vit: Built) -> None:
    report = report_of(vit, whole_run())
    spent = {"export": 30.0, "features": 7.0, "stage1": 5.5, "stage2": 2.0, "baseline": 9.0, "evaluation": 5.0}
    spent["fleet_evaluation"] = 3.0
    assert report["seconds"] == {**spent, "total": 100.0}
    assert report["bytes_up_per_device_round"] == 1500.0
    assert report["bytes_down_per_device_round"] == 3250.0
    assert report["device_peak_rss_mb"] == 120.0
    assert report["device_peak_rss_mb_per_device"] == {"a": 120.0, "b": 110.0, "c": 0.0}


@pytest.mark.usefixtures("no_png")
def test_without_a_baseline_there_is_no_local_only(vit: Built, folder: Path) -> None:
    evaluation = FleetEvaluation(fleet_accuracies(baseline=False), {})
    assert "local_only" not in report_of(vit, whole_run(baseline=False), evaluation)["accuracy"]
    record(folder, whole_run(baseline=False))
    write_report(folder, evaluation, seed=0, alpha=0.5, seconds=SECONDS, used=60, skipped=0)
    assert "local only" not in (folder / "report.html").read_text()


def test_a_repeated_round_counts_once_in_rounds_and_twice_in_seconds(vit: Built) -> None:
    first, *others = whole_run()
    report = report_of(vit, [first, trained(0, 1, repeated="too few", missing=("d",)), *others])
    assert report["rounds"]["stage1"] == 2
    assert report["levels"] == [1, 2]
    assert report["seconds"]["stage1"] == 7.5
    assert report["devices"] == 4


def test_a_model_that_some_devices_lack_is_averaged_over_the_others(vit: Built, folder: Path) -> None:
    rounds = whole_run()
    del rounds[-1].updates["b"].metrics["local_only"]
    assert report_of(vit, rounds)["accuracy"]["local_only"] == {"mean": 0.25, "per_device": {"a": 0.25}}
    record(folder, rounds)
    write_report(folder, FLEET, seed=0, alpha=0.5, seconds=SECONDS, used=60, skipped=0)


@pytest.mark.usefixtures("no_png")
def test_a_report_names_what_is_missing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = whole_run()
    del rounds[-1].updates["b"].metrics["local_only"]
    del rounds[-1].updates["c"]
    late = closed(Stage.BASELINE, update("a", Stage.BASELINE, 8), missing=("c",))
    record(folder, [*rounds[:-1], late, rounds[-1]])
    write_report(folder, FLEET, seed=0, alpha=0.5, seconds=SECONDS, used=60, skipped=0)
    printed, page = capsys.readouterr().out.splitlines(), (folder / "report.html").read_text()
    for text in (
        "All accuracies are without c: no evaluation of theirs arrived.",
        "local only is without b, and cannot be compared.",
        "c took part in 0 of 3 training rounds.",
    ):
        assert text in printed
        assert text in page
    assert json.loads((folder / "report.json").read_text())["missing"]["evaluation"] == ["c"]


def test_the_same_rounds_give_the_same_bytes(folder: Path) -> None:
    record(folder, whole_run())
    written = []
    for _ in range(2):
        write_report(folder, FLEET, seed=0, alpha=0.5, seconds=SECONDS, used=60, skipped=0)
        written.append([(folder / f"report.{kind}").read_bytes() for kind in ("json", "html", "png")])
    assert written[0] == written[1]
    assert json.loads(written[0][0])["accuracy"]["mofm"]["mean"] == 0.8125


def test_the_page_needs_no_other_file_and_the_chart_has_its_size(folder: Path) -> None:
    model = folder / "devices" / "a" / "personalized.onnx"
    model.parent.mkdir(parents=True)
    model.touch()
    record(folder, whole_run())
    write_report(folder, FLEET, seed=0, alpha=0.5, seconds=SECONDS, used=60, skipped=0)
    page = (folder / "report.html").read_text()
    assert page.count("<img ") == page.count('src="data:image/svg+xml;base64,') == 4
    assert 'href="devices/a/personalized.onnx"' in page
    assert "devices/b/personalized.onnx" not in page
    assert "<script" not in page
    assert Image.open(folder / "report.png").size == (1600, 1000)


@pytest.mark.parametrize("rounds", [whole_run()[:-1], []])
def test_a_run_without_evaluation_is_one_clear_error(vit: Built, rounds: list[ClosedRound]) -> None:
    with pytest.raises(RunError, match="no evaluation"):
        report_of(vit, rounds)


def test_an_unreadable_record_is_one_clear_error(folder: Path) -> None:
    with pytest.raises(RunError, match="no run at"):
        write_report(folder, FLEET, seed=0, alpha=0.5, seconds=SECONDS, used=60, skipped=0)
    (folder / "run.sqlite").write_text("torn")
    with pytest.raises(RunError, match="cannot be read"):
        write_report(folder, FLEET, seed=0, alpha=0.5, seconds=SECONDS, used=60, skipped=0)
