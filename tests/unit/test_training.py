"""AdamW, the mixture and the targets of local training."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.engines.base import expert_decay
from edge_runtime.training.loop import Targets
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import NEVER
from fedfmsl.algorithms.mixture import (
    accuracy,
    class_mask,
    gate_statistics,
    label_log_p,
    log_softmax,
    mix,
)
from fedfmsl.protocol.layout import Layout


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rate", [1e-3, 0.3])
def test_adamw_equals_torchs_over_many_steps(rate: float, decay: float) -> None:
    import torch  # takes seconds

    rng = np.random.default_rng(0)
    theta = rng.normal(size=50).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    theirs = torch.optim.AdamW([parameter], lr=rate, weight_decay=decay)
    ours = AdamW(rate, np.full(50, decay, np.float32))
    for step in range(12):
        gradient = (rng.normal(size=50) * 10.0 ** rng.integers(-6, 3, 50)).astype(np.float32)
        gradient[: step * 4] = 0
        parameter.grad = torch.from_numpy(gradient)
        theirs.step()
        theta = ours.step(theta, gradient)
        assert theta.dtype == np.float32
        assert np.allclose(theta, parameter.detach().numpy(), rtol=1e-5, atol=1e-6 * max(1, rate / 1e-3))


def test_adamw_does_not_change_its_arguments() -> None:
    theta, gradient = np.ones(3, np.float32), np.full(3, 2, np.float32)
    AdamW(0.1, np.zeros(3, np.float32)).step(theta, gradient)
    assert theta.tolist() == [1, 1, 1]
    assert gradient.tolist() == [2, 2, 2]


def test_weight_decay_applies_to_lora_but_not_to_the_head() -> None:
    layout = Layout.build([("head", "w", (2,)), ("0", "a", (3,))])
    optimizer = AdamW(0.1, expert_decay(layout, 5, 0.5))
    theta = optimizer.step(np.ones(5, np.float32), np.zeros(5, np.float32))
    assert np.allclose(theta, [1, 1, 0.95, 0.95, 0.95])


LOGITS = st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=4)


@given(LOGITS)
def test_log_softmax_is_normalized_and_does_not_overflow(rows: list[list[float]]) -> None:
    logits = np.array(rows, np.float32)
    log_p = log_softmax(logits + np.array([0, 0, 2 * NEVER], np.float32))
    assert np.allclose(np.exp(log_p.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    wide = logits.astype(np.float64)
    assert np.allclose(log_softmax(logits), wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)), atol=1e-4)


@given(st.integers(1, 5), st.integers(2, 4), st.integers(0, 99))
def test_the_mixture_is_the_gates_weighted_sum_of_probabilities(size: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gate = rng.dirichlet(np.ones(2), size).astype(np.float32)
    one, two = (rng.dirichlet(np.ones(classes), size).astype(np.float32) for _ in range(2))
    mixed = np.exp(mix(np.log(gate), np.log(one), np.log(two)))
    assert np.allclose(mixed, gate[:, :1] * one + gate[:, 1:] * two, atol=1e-5)
    weight, entropy = gate_statistics(np.log(gate))
    assert weight == pytest.approx(gate[:, 1].mean(), abs=1e-5)
    assert entropy == pytest.approx(-(gate * np.log(gate)).sum(axis=1).mean(), abs=1e-5)
    assert 0 <= entropy <= np.log(2) + 1e-6


def test_one_expert_alone_cannot_exclude_a_class() -> None:
    half = np.log(np.full((1, 2), 0.5, np.float32))
    certain = np.array([[0.0, NEVER]], np.float32)
    assert np.exp(mix(half, half, certain)) == pytest.approx(np.array([[0.75, 0.25]]))


def test_the_class_mask_restricts_a_softmax_to_held_classes() -> None:
    counts = np.array([8, 0, 2])
    assert class_mask(counts).tolist() == [0.0, NEVER, 0.0]
    masked = np.exp(log_softmax(np.zeros((1, 3), np.float32) + class_mask(counts)))
    assert masked.tolist() == [[0.5, 0.0, 0.5]]


def test_accuracy_counts_hits_and_is_zero_without_samples() -> None:
    log_p = np.log(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], np.float32))
    labels = np.array([0, 1, 1])
    assert accuracy(log_p, labels) == pytest.approx(2 / 3)
    assert np.exp(label_log_p(log_p, labels)) == pytest.approx(np.array([0.9, 0.8, 0.4]))
    assert accuracy(np.empty((0, 2), np.float32), np.empty(0, np.int64)) == 0.0


def test_cross_entropy_targets_ignore_the_other_expert() -> None:
    targets = Targets.cross_entropy(np.array([1, 0]))
    assert targets.gate.tolist() == [0, 0]
    assert np.exp(targets.other).tolist() == [0, 0]
