"""The personalized model that a device has after every round: real photos, real ONNX Runtime, real files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.bundles import Built, run_graph
from support.in_process_daemon import make_daemon
from support.personal_models import SHA, globals_of, round_of

from edge_runtime.data.inputs import reader_of
from edge_runtime.data.samples import labels_of
from edge_runtime.engines.sessions import open_model, run
from edge_runtime.inference.export_onnx import write_model
from edge_runtime.training.evaluation import evaluate, train_alone
from edge_runtime.training.local_expert import LocalExpert, mixture, train_personal
from edge_runtime.training.model import keep_personal_model, personal_model, read_personal_model
from edge_runtime.training.stages import Globals, Work, statistics, train_global
from fedfmsl.algorithms.calibration import fit_temperature
from fedfmsl.algorithms.mixture import nll
from fedfmsl.errors import BundleError, InputError
from fedfmsl.protocol.messages import Stage

NOTHING = np.empty(0, np.float32)

WORK: dict[Stage, Work] = {
    Stage.STATISTICS: statistics,
    Stage.GLOBAL: train_global,
    Stage.PERSONAL: train_personal,
    Stage.BASELINE: train_alone,
    Stage.EVALUATE: evaluate,
}


@pytest.mark.parametrize("stage", WORK)
def test_after_every_stage_there_is_a_model_of_what_the_device_has_by_then(
    vit: Built, photos: Path, tmp_path: Path, stage: Stage
) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    given = Globals(NOTHING, NOTHING, NOTHING) if stage is Stage.STATISTICS else globals_of(vit)
    WORK[stage](device, round_of(stage), given)
    keep_personal_model(device, round_of(stage), given)
    model = read_personal_model(device.store)
    header = model.header
    assert (header.device, header.round, header.bundle) == ("d", 3, vit.bundle.sha256)
    assert (header.expert, header.gate) == (("", "") if stage is Stage.STATISTICS else (SHA, SHA))
    images = device.scanned.train
    probabilities, gate = run_graph(
        vit.bundle,
        f"personal-{header.level}.onnx",
        ["probabilities", "gate"],
        **reader_of(vit.bundle).batch([image.path for image in images]),
        **model.inputs,
    )
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.allclose(gate, 0.5, atol=1e-6)  # no server has averaged any gate yet
    assert not np.allclose(model.inputs["local_theta"], model.inputs["global_theta"])
    if stage is Stage.STATISTICS:
        assert (probabilities.argmax(axis=1) == labels_of(images)).mean() > 0.8
    if stage is Stage.PERSONAL:
        best = LocalExpert.load(device, "s")
        assert best is not None
        seen = mixture(device, images, given, best.best, best.best_level)
        assert np.allclose(probabilities, np.exp(model.calibrated(seen.log_p)), atol=2e-3)  # fp16 states


def test_temperature_and_threshold_are_those_of_the_held_out_slice(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    given = globals_of(vit)
    model = personal_model(device, round_of(Stage.GLOBAL), given)
    images = device.slices.held_out
    labels = labels_of(images)

    (probabilities,) = run_graph(
        vit.bundle,
        f"personal-{model.header.level}.onnx",
        ["probabilities"],
        **reader_of(vit.bundle).batch([image.path for image in images]),
        **{**model.inputs, "temperature": np.ones(1, np.float32)},
    )
    assert model.header.temperature == pytest.approx(fit_temperature(np.log(probabilities), labels), rel=1e-2)
    assert len(images) < 19
    assert model.header.threshold == 0  # so few say nothing about one in twenty


def test_what_a_device_evaluates_is_the_model_that_it_keeps(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    given = globals_of(vit)
    for index in range(2):
        train_personal(device, round_of(Stage.PERSONAL, index), given)
    outcome = evaluate(device, round_of(Stage.EVALUATE), given)
    before = device.store.results.read_bytes()
    keep_personal_model(device, round_of(Stage.EVALUATE), given)
    write_model(device.store, tmp_path / "model.onnx", vit.bundle.root)
    model = open_model(tmp_path / "model.onnx", 1)
    images = device.scanned.test
    pixels = reader_of(vit.bundle).batch([image.path for image in images])
    (probabilities,) = run(model, ["probabilities"], pixels)
    labels = labels_of(images)
    assert outcome.metrics["mofm_nll"] == pytest.approx(nll(np.log(probabilities), labels), abs=1e-3)
    assert outcome.metrics["mofm"] == (probabilities.argmax(axis=1) == labels).mean()
    assert device.store.results.read_bytes() == before


def test_the_onnx_file_names_what_it_is_made_of(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    keep_personal_model(device, round_of(Stage.GLOBAL), globals_of(vit))
    write_model(device.store, tmp_path / "model.onnx", vit.bundle.root)
    header, manifest = read_personal_model(device.store).header, vit.bundle.manifest
    named = {entry.key: entry.value for entry in onnx.load(str(tmp_path / "model.onnx")).metadata_props}
    assert named == {
        **{"run": "r", "session": "s", "round": "3", "device": "d", "level": str(header.level)},
        **{"bundle": vit.bundle.sha256, "expert": SHA, "gate": SHA, "model": manifest.model},
        **{"temperature": str(header.temperature), "threshold": str(header.threshold)},
        "classes": '["apple", "kiwi", "lemon", "plum"]',
        "preprocessing": manifest.preprocessing.model_dump_json(),
        "tokenizer": "",
    }


def test_a_model_is_written_with_its_own_bundle_only(vit: Built, dinov2: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    with pytest.raises(InputError, match="no personalized model yet"):
        write_model(device.store, tmp_path / "model.onnx", vit.bundle.root)
    keep_personal_model(device, round_of(Stage.GLOBAL), globals_of(vit))
    with pytest.raises(BundleError, match="is not that of the model"):
        write_model(device.store, tmp_path / "model.onnx", dinov2.bundle.root)
    device.store.mixture.write_bytes(b"torn")
    with pytest.raises(InputError, match="next round makes it anew"):
        write_model(device.store, tmp_path / "model.onnx", vit.bundle.root)


def test_a_device_that_bears_less_than_the_globals_level_has_a_model_of_all_of_it(
    vit: Built, photos: Path, tmp_path: Path
) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    device = replace(device, level_cap=1)
    model = personal_model(device, round_of(Stage.GLOBAL), globals_of(vit, level=2))
    assert model.header.level == 2
    assert np.array_equal(model.inputs["global_theta"], globals_of(vit, level=2).expert)
