"""Predictions that follow the classes of the files, without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from edge_runtime.inference import adaptation
from edge_runtime.inference.adaptation import PriorAdapter
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.algorithms.calibration import calibrate
from fedfmsl.algorithms.label_shift import MIN_SAMPLES, adapted_prior, prior_shift
from fedfmsl.algorithms.mixture import log_softmax


@dataclass(frozen=True)
class Facts:
    temperature: float = 1.5
    prior: tuple[float, ...] = (0.4, 0.4, 0.2)
    held: tuple[bool, ...] = (True, True, False)


MODEL = Facts()


def probabilities(*logits: float) -> Floats:
    """Calibrated probabilities (C,) as the model gives them."""
    return np.exp(calibrate(log_softmax(np.array([logits], np.float32)), MODEL.temperature))[0]


def test_the_first_files_have_the_models_own_probabilities() -> None:
    adapter, file = PriorAdapter(), probabilities(0, 0, 9)
    for _ in range(MIN_SAMPLES - 1):
        assert adapter.adapt(file, MODEL) == pytest.approx(file, abs=1e-6)
    assert adapter.adapt(file, MODEL)[2] > file[2]


def test_files_of_a_novel_class_make_it_more_likely_and_files_of_held_ones_less() -> None:
    uncertain = probabilities(1.0, 0.0, 0.9)
    results = []
    for logits in ((0.0, 0.0, 9.0), (9.0, 0.0, 0.0)):
        adapter = PriorAdapter()
        for _ in range(30):
            adapter.adapt(probabilities(*logits), MODEL)
        results.append(adapter.adapt(uncertain, MODEL))
    assert uncertain.argmax() == 0
    assert results[0].argmax() == 2
    assert results[1][2] < uncertain[2]
    assert all(each.sum() == pytest.approx(1, abs=1e-5) for each in results)


def test_the_prior_is_exchanged_before_the_temperature_is_applied() -> None:
    adapter, logits = PriorAdapter(), np.array([[0.3, 0.0, 2.0]] * MIN_SAMPLES, np.float32)
    adapted = [adapter.adapt(probabilities(*row), MODEL) for row in logits.tolist()][-1]
    log_p, prior = log_softmax(logits), np.array(MODEL.prior, np.float32)
    shifted = log_p + prior_shift(prior, adapted_prior(log_p, prior, np.array(MODEL.held)))
    assert adapted == pytest.approx(np.exp(calibrate(shifted, MODEL.temperature))[-1], abs=1e-5)


def test_a_class_without_a_prior_stays_impossible() -> None:
    model, adapter = Facts(prior=(0.5, 0.5, 0.0)), PriorAdapter()
    for _ in range(20):
        adapted = adapter.adapt(np.array([0.6, 0.4, 0.0], np.float32), model)
    assert np.isfinite(adapted).all()
    assert adapted[2] < 1e-12
    assert adapted.argmax() == 0


def test_another_class_prior_starts_the_estimate_again_also_with_other_classes() -> None:
    adapter = PriorAdapter()
    for _ in range(30):
        adapter.adapt(probabilities(0, 0, 9), MODEL)
    four = Facts(prior=(0.25, 0.25, 0.25, 0.25), held=(True, True, True, True))
    file = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    assert adapter.adapt(file, four) == pytest.approx(file, abs=1e-6)


def test_old_files_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptation, "WINDOW", 30)
    adapter, fresh = PriorAdapter(), PriorAdapter()
    for _ in range(MIN_SAMPLES):
        adapter.adapt(probabilities(0, 0, 9), MODEL)
    for _ in range(30):
        last = adapter.adapt(probabilities(2, 0, 0), MODEL)
        assert fresh.adapt(probabilities(2, 0, 0), MODEL).sum() == pytest.approx(1, abs=1e-5)
    assert last == pytest.approx(fresh.adapt(probabilities(2, 0, 0), MODEL), abs=1e-6)
