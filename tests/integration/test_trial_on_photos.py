"""python -m devices.trial on a user's own photos and model."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.processes import Ended, run_module
from support.samples import CLASSES, write_device_photos

from devices.trial.evaluation import evaluate_fleet
from fedfmsl.protocol.task_bundle import TaskBundle

DEVICES, STAGE1, STAGE2 = 3, 2, 1
NAMES = [f"device-{index}" for index in range(DEVICES)]
ACCURACIES = {"start", "local_only", "global", "global_prior", "local_expert", "mofm"}
ENGINE = "step-graph"
REPORT = {
    *("seed", "alpha", "devices", "classes", "model", "rounds", "seconds", "accuracy", "accuracy_global_test", "gate"),
    *("accuracy_fleet", "accuracy_novel", "accuracy_stream", "harmonic", "worst_decile", "unseen"),
    *("levels", "tuned_share", "tuned_parameters", "backbone_parameters"),
    *("bytes_up_per_device_round", "bytes_down_per_device_round", "device_peak_rss_mb"),
    "engines",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trial")


@pytest.fixture(scope="module")
def ended(directory: Path, vit_folder: Path) -> Ended:
    photos = write_device_photos(directory / "photos", dict.fromkeys(CLASSES, 30), seed=9)
    return run_module(
        "devices.trial",
        *("--images", str(photos), "--classes-from-folders", "--model", str(vit_folder), "--devices", str(DEVICES)),
        *("--stage1-rounds", str(STAGE1), "--stage2-rounds", str(STAGE2), "--alpha", "1", "--name", "tiny"),
        *("--engine", ENGINE, "--unseen", "1"),
        cwd=directory,
    )


@pytest.fixture(scope="module")
def folder(ended: Ended, directory: Path) -> Path:
    assert ended.code == 0, ended.stdout + ended.stderr
    return directory / "runs" / "tiny"


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return read


def test_the_report_has_every_documented_key(report: dict[str, Any]) -> None:
    assert set(report) >= REPORT
    assert set(report["rounds"]) == {"stage1", "stage2"}
    assert set(report["seconds"]) >= {"export", "features", "stage1", "stage2", "total"}
    assert set(report["accuracy"]) == ACCURACIES
    assert set(report["accuracy_global_test"]) == {"start", "global"}
    assert set(report["gate"]) == {"mean_local_weight", "entropy"}


def test_the_report_has_the_settings_of_the_run(report: dict[str, Any], folder: Path) -> None:
    bundle = TaskBundle.load(folder / "bundle")
    assert (report["seed"], report["alpha"], report["model"]) == (0, 1.0, "tiny-vit")
    assert report["rounds"] == {"stage1": STAGE1, "stage2": STAGE2}
    assert report["engines"] == [ENGINE]
    assert len(report["levels"]) >= STAGE1
    assert report["tuned_share"] == bundle.tuned_share
    assert report["tuned_parameters"] == bundle.tuned_parameters
    assert report["backbone_parameters"] == bundle.manifest.backbone_parameters


@pytest.mark.parametrize("model", sorted(ACCURACIES))
def test_every_accuracy_is_a_mean_over_all_devices(report: dict[str, Any], model: str) -> None:
    accuracy = report["accuracy"][model]
    assert len(accuracy["per_device"]) == DEVICES
    assert 0 <= accuracy["mean"] <= 1


def test_every_model_is_measured_on_the_fleets_test_photos(report: dict[str, Any]) -> None:
    for key in ("accuracy_fleet", "accuracy_novel"):
        assert set(report[key]) == ACCURACIES
        for accuracy in report[key].values():
            assert set(accuracy["per_device"]) == set(NAMES)
    assert set(report["accuracy_stream"]["mofm"]) == {"0", "0.1", "0.5"}
    for model in ACCURACIES - {"mofm"}:  # which adapts along a stream
        assert report["accuracy_stream"][model]["0"] == pytest.approx(report["accuracy"][model]["mean"], abs=1e-5)
        assert 0 <= report["worst_decile"][model] <= report["accuracy"][model]["mean"] + 1e-6
    assert report["accuracy_novel"]["local_only"]["mean"] == 0  # it knows the held classes only
    assert report["accuracy_novel"]["global"]["mean"] > 0


def test_the_fleets_evaluation_agrees_with_the_devices_own(report: dict[str, Any], folder: Path) -> None:
    found = evaluate_fleet(folder, [folder / "samples" / name for name in NAMES])
    for model in ACCURACIES:
        for name, own in report["accuracy"][model]["per_device"].items():
            assert found.devices[model][name].own == pytest.approx(own, abs=1e-6), (model, name)


def test_a_device_without_an_evaluation_is_not_measured_but_its_photos_are(folder: Path, tmp_path: Path) -> None:
    """A straggler in the last round has no models of that round. Its test photos are still those of the fleet."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    with closing(sqlite3.connect(copy / "run.sqlite")) as db, db:
        last = "DELETE FROM round_devices WHERE round = (SELECT max(round) FROM rounds) AND device = ?"
        db.execute(last, (NAMES[0],))
    shutil.rmtree(copy / "devices" / NAMES[0] / "globals")
    roots = [copy / "samples" / name for name in NAMES]
    found = evaluate_fleet(copy, roots).devices["global"]
    assert set(found) == {*NAMES[1:]}
    assert {each.fleet_count for each in found.values()} == {sum(1 for root in roots for _ in root.glob("test/*/*"))}


def test_an_unseen_device_took_no_part(report: dict[str, Any], folder: Path) -> None:
    assert set(report["unseen"]["accuracy"]["global"]["per_device"]) == {"device-3"}
    assert report["devices"] == DEVICES
    assert not (folder / "devices" / "device-3").exists()
    assert "device-3" not in report["accuracy_fleet"]["global"]["per_device"]


def test_no_device_holds_photos_of_another(folder: Path) -> None:
    """All photos are tested with every device's models, but only by the trial."""
    photos = {
        name: {hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "samples" / name).rglob("*.jpg")}
        for name in (*NAMES, "device-3")
    }
    assert len(set().union(*photos.values())) == sum(map(len, photos.values()))
    for name in NAMES:
        state = folder / "devices" / name
        with closing(sqlite3.connect(state / "samples.sqlite")) as db:
            known = {
                sha256 for (sha256,) in db.execute("SELECT sha256 FROM slices UNION SELECT sha256 FROM file_versions")
            }
        assert known == photos[name]
        assert not (state / "cache").exists()
        assert not [path for path in state.rglob("*") if path.suffix == ".jpg" or path.name in photos["device-3"]]


def test_stages_and_bytes_and_memory_are_measured(report: dict[str, Any]) -> None:
    seconds = report["seconds"]
    assert all(0 < seconds[name] < seconds["total"] for name in ("export", "stage1", "stage2"))
    assert report["bytes_up_per_device_round"] > 0
    assert report["bytes_down_per_device_round"] > 0


def test_the_folder_holds_the_report_the_adapter_and_every_personalized_model(folder: Path) -> None:
    assert "<html" in (folder / "report.html").read_text().lower()
    assert (folder / "global_expert" / "adapter_model.safetensors").is_file()
    for name in NAMES:
        assert (folder / "devices" / name / "personalized.onnx").is_file()


def test_a_personalized_model_of_a_trial_predicts(folder: Path) -> None:
    photo = next((folder / "samples" / NAMES[0]).rglob("*.jpg"))
    model = folder / "devices" / NAMES[0] / "personalized.onnx"
    ended = run_module("edge_runtime", "predict", "--model", str(model), str(photo), "--json")
    assert ended.code == 0, ended.stderr
    probabilities = json.loads(ended.stdout)["probabilities"]
    assert set(probabilities) == set(CLASSES)
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)


def test_every_process_of_the_trial_has_a_log_without_a_traceback(folder: Path) -> None:
    logs = {path.stem: path.read_text() for path in (folder / "logs").iterdir()}
    assert set(logs) == {"broker", "server", *NAMES}
    assert [name for name, text in logs.items() if "Traceback" in text] == []


def test_a_folder_that_is_not_a_trial_is_not_overwritten(directory: Path, vit_folder: Path, folder: Path) -> None:
    mine = directory / "runs" / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("not a trial")
    options = ("--images", str(directory / "photos"), "--model", str(vit_folder), "--name", "mine")
    run_module("devices.trial", *options, cwd=directory).assert_error(2, "runs/mine", "choose another --name")
    assert (mine / "thesis.txt").is_file()
