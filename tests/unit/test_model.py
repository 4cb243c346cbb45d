"""The personalized model after every round: real photos, real ONNX Runtime, real files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.bundles import Built, run_graph
from support.in_process_daemon import make_daemon
from support.personal_models import SHA, globals_of, round_of

from edge_runtime.daemon.status import describe_model
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.samples import labels_of
from edge_runtime.engines.sessions import open_model, run
from edge_runtime.inference.export_onnx import write_model
from edge_runtime.training.evaluation import evaluate, predict_models, train_baseline
from edge_runtime.training.local_expert import LocalExpert, train_personal
from edge_runtime.training.mixture import compute_mixture, global_temperature, tempered
from edge_runtime.training.model import make_personal_model, save_personal_model
from edge_runtime.training.stages import Globals, StageFunction, statistics, train_global
from edge_runtime.training.stored_model import is_exported, read_personal_model, served_accuracy
from fedfmsl.algorithms.calibration import fit_temperature
from fedfmsl.algorithms.mixture import accuracy, nll
from fedfmsl.errors import BundleError, InputError
from fedfmsl.protocol.messages import Stage
from fedfmsl.protocol.tensors import pack

EMPTY = np.empty(0, np.float32)

STAGES: dict[Stage, StageFunction] = {
    Stage.STATISTICS: statistics,
    Stage.GLOBAL: train_global,
    Stage.PERSONAL: train_personal,
    Stage.BASELINE: train_baseline,
    Stage.EVALUATE: evaluate,
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_leaves_a_model_of_the_newest_experts(
    vit: Built, photos: Path, tmp_path: Path, stage: Stage
) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    published = Globals(EMPTY, EMPTY, EMPTY) if stage is Stage.STATISTICS else globals_of(vit)
    STAGES[stage](device, round_of(stage), published)
    save_personal_model(device, round_of(stage), published)
    model = read_personal_model(device.store)
    header = model.header
    assert (header.device, header.round, header.bundle) == ("d", 3, vit.bundle.sha256)
    assert (header.expert, header.gate) == (("", "") if stage is Stage.STATISTICS else (SHA, SHA))
    samples = device.scanned.train
    probabilities, gate = run_graph(
        vit.bundle,
        f"personal-{header.level}.onnx",
        ["probabilities", "gate"],
        **reader_of(vit.bundle).batch([sample.path for sample in samples]),
        **model.inputs,
    )
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.allclose(gate, 0.5, atol=1e-6)  # the device holds every class, so Bayes' rule is the local share
    assert not np.allclose(model.inputs["local_theta"], model.inputs["global_theta"])
    if stage is Stage.STATISTICS:
        assert (probabilities.argmax(axis=1) == labels_of(samples)).mean() > 0.8
    if stage is Stage.PERSONAL:
        best = LocalExpert.load(device, "s")
        assert best is not None
        scale = global_temperature(device, published)
        mixture = compute_mixture(device, samples, published, scale, best.best, best.best_level)
        assert np.allclose(probabilities, np.exp(model.calibrated(mixture.log_p)), atol=2e-3)  # fp16 hidden states


def test_temperature_and_threshold_come_from_the_held_out_split(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    published = globals_of(vit)
    model = make_personal_model(device, round_of(Stage.GLOBAL), published)
    samples = device.splits.held_out
    labels = labels_of(samples)

    (probabilities,) = run_graph(
        vit.bundle,
        f"personal-{model.header.level}.onnx",
        ["probabilities"],
        **reader_of(vit.bundle).batch([sample.path for sample in samples]),
        **{**model.inputs, "temperature": np.ones(1, np.float32)},
    )
    assert model.header.temperature == pytest.approx(fit_temperature(np.log(probabilities), labels), rel=1e-2)
    assert len(samples) < 19
    assert model.header.threshold == 0  # 19 samples are needed for a share of 5 %


def test_the_evaluated_model_is_the_saved_one(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    published = globals_of(vit)
    for index in range(2):
        train_personal(device, round_of(Stage.PERSONAL, index), published)
    result = evaluate(device, round_of(Stage.EVALUATE), published)
    before = device.store.results.read_bytes()
    save_personal_model(device, round_of(Stage.EVALUATE), published)
    served = served_accuracy(device.store)
    assert served and served.accuracy == result.metrics["mofm"]
    write_model(device.store, tmp_path / "model.onnx", vit.bundle.root)
    model = open_model(tmp_path / "model.onnx", 1)
    samples = device.scanned.test
    pixels = reader_of(vit.bundle).batch([sample.path for sample in samples])
    (probabilities,) = run(model, ["probabilities"], pixels)
    labels = labels_of(samples)
    assert result.metrics["mofm_nll"] == pytest.approx(nll(np.log(probabilities), labels), abs=1e-3)
    assert result.metrics["mofm"] == (probabilities.argmax(axis=1) == labels).mean()
    assert device.store.results.read_bytes() == before


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_model_that_is_not_finite_is_refused_in_one_line(vit: Built, photos: Path, tmp_path: Path) -> None:
    """Globals of a hostile server, or of training that has diverged."""
    device = make_daemon(vit, photos, tmp_path).device
    good = globals_of(vit)
    hostile = Globals(np.full_like(good.expert, 1e38), good.start, good.gate)
    says = "the model of round .* gives values that are not finite, .*; predictions "
    assert re.match(f"{says}have no model yet", save_personal_model(device, round_of(Stage.GLOBAL), hostile))
    assert save_personal_model(device, round_of(Stage.GLOBAL), good) == ""
    used = read_personal_model(device.store).header
    assert re.match(f"{says}keep the earlier model", save_personal_model(device, round_of(Stage.GLOBAL), hostile))
    assert read_personal_model(device.store).header == used.model_copy(
        update={"kept_at": used.round, "kept_because": "its values are not finite"}
    )
    assert evaluate(device, round_of(Stage.EVALUATE), hostile).model is None


def test_a_devices_models_predict_samples_of_other_devices(vit: Built, photos: Path, tmp_path: Path) -> None:
    """Evaluating them on the device's own test samples gives the accuracies that the device reports."""
    device = make_daemon(vit, photos, tmp_path).device
    round_, published = round_of(Stage.EVALUATE), globals_of(vit)
    train_baseline(device, round_of(Stage.BASELINE), published)
    train_personal(device, round_of(Stage.PERSONAL), published)
    reported = evaluate(device, round_, published).metrics
    names = {"start", "global", "global_prior", "local_expert", "mofm", "local_only"}
    own, others = device.scanned.test, device.scanned.train
    together = predict_models(device, round_, published, others + own)
    assert set(together) == names
    for name, log_p in together.items():
        assert log_p.shape == (len(others) + len(own), device.classes)
        assert np.allclose(np.exp(log_p).sum(axis=1), 1, atol=1e-5)
        assert accuracy(log_p[len(others) :], labels_of(own)) == reported[name]


def top_level_fields(message: bytes) -> Iterator[int]:
    """The numbers of the fields of a protobuf message, in their order. Some readers take a repeated field as two."""

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    at = 0
    while at < len(message):
        key = varint()
        yield key >> 3
        length = varint()  # the value itself in a field of type 0
        at += length if key & 7 == 2 else 0
    assert at == len(message)


def test_the_onnx_file_is_one_message_with_the_origin_as_metadata(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    save_personal_model(device, round_of(Stage.GLOBAL), globals_of(vit))
    write_model(device.store, tmp_path / "model.onnx", vit.bundle.root)
    header, manifest = read_personal_model(device.store).header, vit.bundle.manifest
    file = tmp_path / "model.onnx"
    assert list(top_level_fields(file.read_bytes())).count(onnx.ModelProto.GRAPH_FIELD_NUMBER) == 1
    model = onnx.load(str(file))
    onnx.checker.check_model(model)
    assert (model.ir_version, [opset.version for opset in model.opset_import]) == (9, [20])
    named = {entry.key: entry.value for entry in model.metadata_props}
    assert named == {
        **{"run": "r", "session": "s", "round": "3", "device": "d", "level": str(header.level)},
        **{"bundle": vit.bundle.sha256, "task": vit.bundle.task.sha256, "expert": SHA, "gate": SHA},
        "model": manifest.model,
        **{"temperature": str(header.temperature), "threshold": str(header.threshold)},
        "classes": '["apple", "kiwi", "lemon", "plum"]',
        "preprocessing": manifest.preprocessing.model_dump_json(),
        "tokenizer": "",
        "prior": json.dumps(header.prior),
        "held": "[true, true, true, true]",
    }


def test_a_newer_model_is_recognised_by_session_and_round(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    store = device.store
    assert is_exported(store)  # there is nothing to write
    save_personal_model(device, round_of(Stage.GLOBAL), globals_of(vit))
    assert not is_exported(store)
    write_model(store, tmp_path / "copy.onnx", vit.bundle.root)
    assert not is_exported(store)
    write_model(store, store.personalized, vit.bundle.root)
    os.utime(store.personalized, (0, 0))  # the clock was set meanwhile
    assert is_exported(store)
    save_personal_model(device, round_of(Stage.GLOBAL).model_copy(update={"session": "t"}), globals_of(vit))
    assert read_personal_model(store).header.session == "t"  # an equally good model
    os.utime(store.mixture, (0, 0))
    assert not is_exported(store)


def test_a_model_needs_its_own_bundle(vit: Built, dinov2: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    with pytest.raises(InputError, match="no personalized model yet"):
        write_model(device.store, tmp_path / "model.onnx", vit.bundle.root)
    save_personal_model(device, round_of(Stage.GLOBAL), globals_of(vit))
    with pytest.raises(BundleError, match="is not the bundle of the model"):
        write_model(device.store, tmp_path / "model.onnx", dinov2.bundle.root)
    device.store.mixture.write_bytes(b"torn")
    with pytest.raises(InputError, match="next round replaces it"):
        write_model(device.store, tmp_path / "model.onnx", vit.bundle.root)


def test_a_device_with_a_low_level_cap_has_a_model_of_the_globals_level(
    vit: Built, photos: Path, tmp_path: Path
) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    device = replace(device, level_cap=1)
    published = globals_of(vit, level=2)
    model = make_personal_model(device, round_of(Stage.GLOBAL), published)
    assert model.header.level == 2
    expected = tempered(device, published.expert, global_temperature(device, published))
    assert np.array_equal(model.inputs["global_theta"], expected)


def test_a_device_keeps_its_model_while_the_globals_fit_its_samples_less(
    vit: Built, photos: Path, tmp_path: Path
) -> None:
    device = make_daemon(vit, photos, tmp_path).device
    good = globals_of(vit)

    def save(number: int, published: Globals, session: str = "s") -> tuple[str, int]:
        round_ = round_of(Stage.GLOBAL).model_copy(update={"session": session, "round": number})
        text = save_personal_model(device, round_, published)
        return text, read_personal_model(device.store).header.round

    assert save(1, good) == ("", 1)
    hostile = replace(good, expert=(-300 * good.expert).astype(np.float32))
    text, used = save(2, hostile)
    assert used == 1 and "keep the model of run r, round 1" in text
    assert read_personal_model(device.store).header.kept_at == 2
    assert "round 1; that of round 2 is not used: held-out samples are less likely" in describe_model(device.store)
    evaluate(device, round_of(Stage.EVALUATE).model_copy(update={"round": 2}), hostile)
    served, test = served_accuracy(device.store), device.scanned.test  # of the model in use, not of the evaluated one
    mofm = predict_models(device, round_of(Stage.GLOBAL), good, test)["mofm"]
    assert served and (served.round, served.accuracy) == (1, accuracy(mofm, labels_of(test)))
    text, used = save(1, Globals(EMPTY, EMPTY, EMPTY), session="t")  # a new run has no global head yet
    assert used == 1 and "there is no global head yet" in text
    assert save(3, good) == ("", 3)
    assert served_accuracy(device.store) is None  # this one is not measured yet
    before = read_personal_model(device.store)
    device.store.mixture.write_bytes(
        pack(before.changed(held_out="", nll=9.0, best_nll=9.0).header, dict(before.tensors))
    )
    assert save(4, hostile)[1] == 3  # scored again, because the held-out samples are others
    assert read_personal_model(device.store).header.nll == pytest.approx(before.header.nll, abs=1e-4)
