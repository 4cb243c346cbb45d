"""Predictions that adapt to the classes of unlabelled files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.bundles import Built
from support.in_process_daemon import make_daemon
from support.personal_models import globals_of, round_of
from support.samples import write_photos

from edge_runtime.inference.adaptation import PriorAdapter
from edge_runtime.inference.classifier import FileClassifier, StateClassifier
from edge_runtime.inference.export_onnx import write_model
from edge_runtime.training.model import save_personal_model
from fedfmsl.algorithms.label_shift import MIN_SAMPLES
from fedfmsl.protocol.messages import Stage


@dataclass(frozen=True)
class Facts:
    """The device holds the first two of three classes."""

    temperature: float = 1.5
    prior: tuple[float, ...] = (0.4, 0.4, 0.2)
    held: tuple[bool, ...] = (True, True, False)


UNDECIDED = np.array([0.5, 0.05, 0.45], np.float32)
NOVEL = np.array([0.02, 0.02, 0.96], np.float32)
OWN = np.array([0.9, 0.09, 0.01], np.float32)


def adapted(stream: list[np.ndarray], last: np.ndarray) -> np.ndarray:
    adapter = PriorAdapter()
    for probabilities in stream:
        adapter.adapt(probabilities, Facts())
    return adapter.adapt(last, Facts())


def test_few_files_change_nothing() -> None:
    few = [NOVEL] * (MIN_SAMPLES - 2)
    assert np.allclose(adapted(few, UNDECIDED), UNDECIDED, atol=1e-6)


def test_an_undecided_file_follows_the_classes_of_the_files_before_it() -> None:
    among_novel, among_own = adapted([NOVEL] * 50, UNDECIDED), adapted([OWN] * 50, UNDECIDED)
    assert among_novel.argmax() == 2
    assert among_own.argmax() == 0
    assert among_own[2] < UNDECIDED[2] < among_novel[2]
    assert np.allclose([among_novel.sum(), among_own.sum()], 1, atol=1e-6)


def test_a_long_stream_of_certain_files_gives_finite_probabilities() -> None:
    certain = np.array([1.0, 0.0, 0.0], np.float32)
    assert np.isfinite(adapted([certain] * 100, np.array([0.0, 0.0, 1.0], np.float32))).all()


def test_state_and_onnx_file_adapt_alike(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = make_daemon(vit, photos, tmp_path / "state").device
    save_personal_model(device, round_of(Stage.GLOBAL), globals_of(vit))
    write_model(device.store, tmp_path / "model.onnx", vit.bundle.root)
    by_state = StateClassifier(device.store, vit.bundle.root, adapter=PriorAdapter())
    by_file = FileClassifier(tmp_path / "model.onnx", adapter=PriorAdapter())
    fixed = FileClassifier(tmp_path / "model.onnx")
    changed = 0.0
    for path in sorted(write_photos(tmp_path / "inbox", seed=7).rglob("*.jpg")):
        one, other, before = (
            np.array(list(each.classify(path).probabilities.values())) for each in (by_state, by_file, fixed)
        )
        assert np.allclose(one, other, atol=1e-4)
        changed = max(changed, float(np.abs(other - before).max()))
    assert changed > 1e-4
