"""The mixture: the class prior, Bayes' rule as the gate's start, and class dropout."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import NEVER, Floats
from fedfmsl.algorithms.mixture import (
    NOVEL_RATE,
    SMOOTHING,
    Biases,
    class_dropout,
    class_mask,
    class_prior,
    gate_offset,
    log_frequencies,
    log_softmax,
    log_sum_exp,
    mix,
)

COUNTS = st.lists(st.integers(0, 30), min_size=2, max_size=8).map(np.array)
RATES = st.floats(0.0, 1.0)


@given(COUNTS, RATES)
def test_the_class_prior_sums_to_one_and_novel_classes_share_their_rate(counts: NDArray[np.int64], rate: float) -> None:
    prior, held = class_prior(counts, rate), counts > 0
    assert prior.sum() == pytest.approx(1)
    assert prior.min() >= 0
    if held.any() and not held.all():
        assert prior[~held].sum() == pytest.approx(rate)
        assert np.allclose(prior[~held], rate / (~held).sum())
        assert np.allclose(prior[held] / prior[held].sum(), (counts[held] + SMOOTHING) / (counts[held] + 0.1).sum())


def test_a_device_with_every_class_or_none_has_no_novel_rate() -> None:
    assert class_prior(np.array([3, 1])) == pytest.approx(np.array([3.1, 1.1]) / 4.2)
    assert class_prior(np.array([0, 0, 0])) == pytest.approx(np.full(3, 1 / 3))
    assert class_prior(np.array([8, 0, 2]))[1] == pytest.approx(NOVEL_RATE)


@given(COUNTS, RATES, st.floats(0.0, 1.0))
def test_the_global_expert_gives_a_share_of_held_classes_only(
    counts: NDArray[np.int64], rate: float, share: float
) -> None:
    biases, held = Biases.of_counts(counts, rate, share), counts > 0
    prior, kept, given_ = (np.exp(b.astype(np.float64)) for b in (biases.prior, biases.kept, biases.given))
    assert np.allclose(prior, class_prior(counts, rate), atol=1e-6)
    assert np.allclose(kept + given_, prior, atol=1e-6)
    assert np.allclose(given_[held], share * prior[held], atol=1e-6)
    assert not given_[~held].any()
    assert np.array_equal(biases.held, class_mask(counts))
    assert all(np.isfinite(getattr(biases, name)).all() for name in ("prior", "kept", "given", "held"))


@given(COUNTS)
def test_log_frequencies_are_the_class_prior_of_a_devices_own_samples(counts: NDArray[np.int64]) -> None:
    found = log_frequencies(counts)
    assert np.array_equal(found == NEVER, counts == 0)
    assert np.exp(found[counts > 0]) == pytest.approx(counts[counts > 0] / max(counts.sum(), 1))


def bayes(global_logits: Floats, local_logits: Floats, counts: NDArray[np.int64], share: float) -> NDArray[np.float64]:
    """The mixture's probabilities (B, C) by hand, without logarithms."""
    held = counts > 0
    posterior = np.exp(global_logits.astype(np.float64)) * class_prior(counts)
    posterior /= posterior.sum(axis=1, keepdims=True)
    local = np.exp(local_logits.astype(np.float64)) * held
    local /= local.sum(axis=1, keepdims=True)
    mass = posterior[:, held].sum(axis=1, keepdims=True)
    return np.where(held, (1 - share) * posterior + share * mass * local, posterior)


@given(COUNTS.filter(lambda counts: bool(counts.any())), st.floats(0.0, 1.0), st.integers(0, 99))
def test_an_untrained_gate_mixes_the_experts_by_bayes_rule(counts: NDArray[np.int64], share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, local = rng.normal(0, 3, (2, 5, len(counts))).astype(np.float32)
    biases = Biases.of_counts(counts, local_share=share)
    log_gate = log_softmax(gate_offset(logits, biases))
    mixed = np.exp(mix(log_gate, log_softmax(logits + biases.kept), log_softmax(local + biases.held)))
    assert np.allclose(mixed, bayes(logits, local, counts, share), atol=1e-5)
    assert np.allclose(mixed.sum(axis=1), 1, atol=1e-5)


def test_the_offset_does_not_depend_on_a_shift_of_all_logits() -> None:
    biases = Biases.of_counts(np.array([3, 0, 1]))
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    before, after = (log_softmax(gate_offset(x, biases)) for x in (logits, logits + np.float32(50)))
    assert np.allclose(before, after, atol=1e-4)


def test_a_sample_of_a_novel_class_is_classified_as_the_global_expert_does() -> None:
    counts = np.array([9, 9, 0])
    biases, logits = Biases.of_counts(counts), np.array([[0, 1, 6], [6, 1, 0]], np.float32)
    local = np.array([[9, -9, 9], [-9, 9, 9]], np.float32)
    log_gate = log_softmax(gate_offset(logits, biases))
    mixed = mix(log_gate, log_softmax(logits + biases.kept), log_softmax(local + biases.held))
    assert mixed.argmax(axis=1).tolist() == [2, 1]  # of held classes the local expert knows more
    assert mixed[0, 2] == pytest.approx(log_softmax(logits + biases.prior)[0, 2], abs=1e-5)


def test_without_a_novel_rate_novel_classes_have_no_probability() -> None:
    biases = Biases.of_counts(np.array([9, 9, 0]), novel_rate=0.0)
    logits = np.array([[0, 0, 50]], np.float32)
    mixed = mix(
        log_softmax(gate_offset(logits, biases)), log_softmax(logits + biases.kept), log_softmax(logits + biases.held)
    )
    assert np.exp(mixed[0]) == pytest.approx(np.array([0.5, 0.5, 0.0]))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5).map(np.array), st.integers(0, 99))
def test_class_dropout_drops_the_class_of_each_sample_once(counts: NDArray[np.int64], seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, len(counts), 12)
    seen = []
    for without, rows in class_dropout(counts, labels):
        (dropped,) = set(labels[rows].tolist())
        assert without[dropped] == 0
        assert np.array_equal(np.delete(without, dropped), np.delete(counts, dropped))
        seen += rows.tolist()
    assert sorted(seen) == list(range(12))


def test_class_dropout_needs_another_class() -> None:
    assert not list(class_dropout(np.array([0, 5]), np.array([1, 1])))


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=6))
def test_log_sum_exp_is_exact_for_large_values_and_never(row: list[float]) -> None:
    values = np.array([[*row, NEVER]], np.float32)
    assert log_sum_exp(values) == pytest.approx(np.logaddexp.reduce(np.array(row)), rel=1e-5, abs=1e-4)
