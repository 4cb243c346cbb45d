"""Temperatures and thresholds from splits as small as those of a device."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfmsl.algorithms.arrays import Labels
from fedfmsl.algorithms.calibration import (
    ALPHA,
    PRIOR_MEDIAN,
    calibrate,
    calibrated_nll,
    fit_temperature,
    unknown_threshold,
)
from fedfmsl.algorithms.mixture import log_softmax, nll

Floats = np.ndarray


def draw(size: int, temperature: float, seed: int = 0, classes: int = 5) -> tuple[Floats, Labels]:
    """log p (n, C), and labels drawn from it at `temperature`."""
    rng = np.random.default_rng(seed)
    log_p = log_softmax(rng.normal(0, 3, (size, classes)).astype(np.float32))
    cumulated = np.exp(calibrate(log_p, temperature)).cumsum(axis=1)
    labels = (rng.random((size, 1)) > cumulated).sum(axis=1).clip(max=classes - 1)
    return log_p, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_with_many_samples_the_temperature_is_that_of_the_labels(temperature: float) -> None:
    fitted = fit_temperature(*draw(20_000, temperature))
    assert fitted == pytest.approx(temperature, rel=0.05)


def test_the_calibrated_likelihood_does_not_depend_on_the_scale_of_the_logits() -> None:
    log_p, labels = draw(2_000, 1.0)
    usual = calibrated_nll(log_p, labels)
    assert calibrated_nll(log_softmax(3 * log_p), labels) == pytest.approx(usual, abs=0.01)
    assert calibrated_nll(np.roll(log_p, 1, axis=1), labels) > usual + 0.5  # every class has another one's logit


def test_no_temperature_near_it_is_better() -> None:
    log_p, labels = draw(2_000, 2.0)
    fitted = fit_temperature(log_p, labels)
    best = nll(calibrate(log_p, fitted), labels)
    assert best < nll(log_p, labels)
    for other in (0.9 * fitted, 1.1 * fitted):
        assert best < nll(calibrate(log_p, other), labels)


@pytest.mark.parametrize("size", [1, 3, 14])
def test_a_small_split_without_errors_does_not_raise_the_confidence(size: int) -> None:
    """Without the prior, the temperature would go to zero."""
    log_p = np.log(np.tile(np.array([[0.9, 0.05, 0.05]], np.float32), (size, 1)))
    assert 1 < fit_temperature(log_p, np.zeros(size, np.int64)) < PRIOR_MEDIAN


def test_fewer_samples_give_a_temperature_nearer_to_the_prior() -> None:
    temperatures = [fit_temperature(*(part[:size] for part in draw(1_000, 4.0))) for size in (0, 4, 40, 1_000)]
    assert temperatures[0] == pytest.approx(PRIOR_MEDIAN)
    assert abs(np.log(temperatures[1] / PRIOR_MEDIAN)) < abs(np.log(temperatures[3] / PRIOR_MEDIAN))
    assert temperatures[3] == pytest.approx(4.0, rel=0.2)


def test_a_class_with_probability_zero_keeps_it() -> None:
    log_p = np.array([[-1e4, np.log(0.7), np.log(0.3)]], np.float32)
    for temperature in (0.1, 1.0, 10.0):
        assert np.exp(calibrate(log_p, temperature))[0, 0] == 0


@given(st.integers(1, 60), st.floats(0.1, 10), st.integers(0, 2**32 - 1))
def test_calibration_keeps_the_order_of_classes(size: int, temperature: float, seed: int) -> None:
    log_p, _ = draw(size, 1.0, seed)
    after = calibrate(log_p, temperature)
    assert np.array_equal(after.argmax(axis=1), log_p.argmax(axis=1))
    assert np.allclose(np.exp(after).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("size", "rank"), [(0, 0), (18, 0), (19, 1), (38, 1), (39, 2), (100, 5)])
def test_the_threshold_is_the_confidence_of_its_rank(size: int, rank: int) -> None:
    confidences = np.random.default_rng(size).permutation(np.linspace(0.2, 0.9, size)).astype(np.float32)
    expected = np.sort(confidences)[rank - 1] if rank else 0.0
    assert unknown_threshold(confidences) == pytest.approx(expected)


def test_at_most_alpha_of_exchangeable_samples_are_unknown() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(2_000):
        drawn = rng.beta(5, 2, 60).astype(np.float32)
        shares.append((drawn[50:] < unknown_threshold(drawn[:50])).mean())
    assert 0.02 < np.mean(shares) < ALPHA + 0.01
