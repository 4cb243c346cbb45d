"""The class prior of unlabelled samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedfmsl.algorithms import label_shift
from fedfmsl.algorithms.arrays import Bools, Floats
from fedfmsl.algorithms.label_shift import MIN_SAMPLES, adapt_in_order, adapted_prior, prior_shift
from fedfmsl.algorithms.mixture import class_prior, log_softmax

COUNTS = np.array([8, 4, 0, 0, 2])
HELD: Bools = COUNTS > 0
PRIOR: Floats = class_prior(COUNTS).astype(np.float32)


def stream(size: int, labels_from: NDArray[np.float64], seed: int, sharpness: float = 3.0) -> tuple[Floats, Floats]:
    """log p (n, C) of a model with PRIOR for `size` samples whose classes have the given frequencies, and how often
    each class occurs. The model's likelihoods are right: they are what the features were drawn from."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(COUNTS), size, p=labels_from)
    features = sharpness * np.eye(len(COUNTS))[labels] + rng.normal(size=(size, len(COUNTS)))
    log_likelihood = sharpness * features  # of unit Gaussians around sharpness · eᵢ, up to a constant
    log_p = log_softmax((log_likelihood + np.log(PRIOR)).astype(np.float32))
    return log_p, np.bincount(labels, minlength=len(COUNTS)) / max(size, 1)


def novel_rate(prior: Floats) -> float:
    return float(prior[~HELD].sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(MIN_SAMPLES, 80), st.integers(0, 99))
def test_the_adapted_prior_is_a_distribution_and_does_not_depend_on_the_order(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_p, _ = stream(size, rng.dirichlet(np.ones(5)), seed, sharpness=rng.uniform(0, 5))
    adapted = adapted_prior(log_p, PRIOR, HELD)
    assert adapted.dtype == np.float32
    assert adapted.min() > 0
    assert adapted.sum() == pytest.approx(1, abs=1e-5)
    assert np.allclose(adapted_prior(log_p[rng.permutation(size)], PRIOR, HELD), adapted, atol=1e-6)


def test_few_samples_leave_the_prior_unchanged() -> None:
    log_p, _ = stream(MIN_SAMPLES - 1, np.array([0, 0, 1.0, 0, 0]), seed=0)
    assert np.array_equal(adapted_prior(log_p, PRIOR, HELD), PRIOR)
    assert np.array_equal(adapted_prior(log_p[:0], PRIOR, HELD), PRIOR)


def test_samples_of_novel_classes_raise_their_rate_and_others_lower_it() -> None:
    novel, _ = stream(100, np.array([0, 0, 0.5, 0.5, 0]), seed=1)
    own, _ = stream(100, np.array([0.6, 0.3, 0, 0, 0.1]), seed=1)
    assert novel_rate(adapted_prior(novel, PRIOR, HELD)) > 0.7
    assert novel_rate(adapted_prior(own, PRIOR, HELD)) < 0.5 * novel_rate(PRIOR)


def test_the_rate_follows_more_evidence() -> None:
    rates = [
        novel_rate(adapted_prior(stream(n, np.array([0, 0, 0.5, 0.5, 0]), seed=2)[0], PRIOR, HELD))
        for n in (10, 40, 400)
    ]
    assert rates == sorted(rates)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_known_rate_of_novel_classes_is_recovered(share: float) -> None:
    labels_from = np.where(HELD, (1 - share) * COUNTS / COUNTS.sum(), share / 2)
    log_p, _ = stream(2000, labels_from, seed=3, sharpness=2.0)
    assert novel_rate(adapted_prior(log_p, PRIOR, HELD)) == pytest.approx(share, abs=0.03)


def test_a_known_shift_of_classes_is_recovered_from_many_samples() -> None:
    labels_from = np.array([0.05, 0.1, 0.3, 0.05, 0.5])
    log_p, frequencies = stream(20000, labels_from, seed=4, sharpness=4.0)
    assert np.allclose(adapted_prior(log_p, PRIOR, HELD), frequencies, atol=0.03)


def test_the_adapted_prior_classifies_a_shifted_stream_better() -> None:
    rng = np.random.default_rng(5)
    labels = rng.choice(5, 400, p=np.array([0.1, 0.05, 0.4, 0.4, 0.05]))
    features = 1.5 * np.eye(5)[labels] + rng.normal(size=(400, 5))
    log_p = log_softmax((1.5 * features + np.log(PRIOR)).astype(np.float32))
    shifted = log_p + prior_shift(PRIOR, adapted_prior(log_p, PRIOR, HELD))
    before, after = ((scores.argmax(axis=1) == labels).mean() for scores in (log_p, shifted))
    assert after > before + 0.1


def test_a_device_with_every_class_adapts_slowly_and_stays_finite() -> None:
    everything = np.ones(5, np.bool_)
    uniform = np.full(5, 0.2, np.float32)
    certain = np.log(np.array([[1, 0, 0, 0, 0]] * 50, np.float32) + 1e-9)
    adapted = adapted_prior(certain, uniform, everything)
    assert adapted.sum() == pytest.approx(1)
    assert 0.2 < adapted[0] < 0.3


def test_a_stream_is_classified_with_the_samples_up_to_each_one_only() -> None:
    log_p, _ = stream(40, np.array([0, 0, 0.5, 0.5, 0]), seed=6)
    whole = adapt_in_order(log_p, PRIOR, HELD)
    assert whole.shape == log_p.shape and whole.dtype == np.float32
    assert np.array_equal(whole[: MIN_SAMPLES - 1], log_p[: MIN_SAMPLES - 1])
    assert np.array_equal(adapt_in_order(log_p[:25], PRIOR, HELD), whole[:25])
    assert np.allclose(whole[-1], log_p[-1] + prior_shift(PRIOR, adapted_prior(log_p, PRIOR, HELD)))
    assert adapt_in_order(log_p[:0], PRIOR, HELD).shape == (0, len(COUNTS))


def test_a_stream_forgets_samples_older_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_shift, "WINDOW", 20)
    novel, own = (
        stream(20, labels, seed=7)[0] for labels in (np.array([0, 0, 0.5, 0.5, 0]), np.array([0.5, 0.5, 0, 0, 0]))
    )
    last = adapt_in_order(np.concatenate([novel, own]), PRIOR, HELD)[-1]
    assert np.array_equal(last, adapt_in_order(own, PRIOR, HELD)[-1])


def test_the_shift_is_zero_for_an_unchanged_prior_and_for_classes_without_one() -> None:
    assert not prior_shift(PRIOR, PRIOR).any()
    impossible = np.array([0.5, 0.5, 0], np.float32)
    assert prior_shift(impossible, impossible).tolist() == [0, 0, 0]
