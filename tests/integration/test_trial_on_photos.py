"""python -m devices.trial on a user's own photos and model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.processes import Ended, run_module
from support.samples import CLASSES, write_device_photos

from fedfmsl.common.onnx_runtime import has_ort_training
from fedfmsl.protocol.bundle import Bundle

DEVICES, STAGE1, STAGE2 = 3, 2, 1
NAMES = [f"device-{index}" for index in range(DEVICES)]
ACCURACIES = {"start", "local_only", "global", "global_prior", "local_expert", "mofm"}
ENGINE = "ort-training" if has_ort_training() else "step-graph"
REPORT = {
    *("seed", "alpha", "devices", "classes", "model", "rounds", "seconds", "accuracy", "accuracy_global_test", "gate"),
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
        *("--stage1-rounds", str(STAGE1), "--stage2-rounds", str(STAGE2), "--alpha", "5", "--name", "tiny"),
        *("--engine", ENGINE),
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


@pytest.mark.ort_training
def test_the_report_has_the_settings_of_the_run(report: dict[str, Any], folder: Path) -> None:
    manifest = Bundle.load(folder / "bundle").manifest
    assert (report["seed"], report["alpha"], report["model"]) == (0, 5.0, "tiny-vit")
    assert report["rounds"] == {"stage1": STAGE1, "stage2": STAGE2}
    assert report["engines"] == [ENGINE]
    assert len(report["levels"]) >= STAGE1
    assert report["tuned_share"] == manifest.tuned_share
    assert report["tuned_parameters"] == manifest.tuned_parameters
    assert report["backbone_parameters"] == manifest.backbone_parameters


@pytest.mark.parametrize("model", sorted(ACCURACIES))
def test_every_accuracy_is_a_mean_over_all_devices(report: dict[str, Any], model: str) -> None:
    accuracy = report["accuracy"][model]
    assert len(accuracy["per_device"]) == DEVICES
    assert 0 <= accuracy["mean"] <= 1


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


@pytest.mark.ort_training
def test_a_personalized_model_of_a_trial_predicts(folder: Path) -> None:
    photo = next((folder / "samples" / NAMES[0]).rglob("*.jpg"))
    model = folder / "devices" / NAMES[0] / "personalized.onnx"
    ended = run_module("edge_runtime", "predict", "--model", str(model), str(photo), "--json")
    assert ended.code == 0, ended.stderr
    probabilities = json.loads(ended.stdout)["probabilities"]
    assert set(probabilities) == set(CLASSES)
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.ort_training
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
