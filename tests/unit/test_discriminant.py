"""The head in closed form: linear discriminant analysis of samples that nobody has in one place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfmsl.algorithms.arrays import Doubles, Floats, Labels
from fedfmsl.algorithms.class_means import class_sums
from fedfmsl.algorithms.discriminant import (
    LOGIT_SHRINKAGE,
    OVERCONFIDENCE,
    SHRINKAGE,
    discriminant_head,
    logit_head,
    second_moments,
    with_former_rows,
    within_scatter,
)
from fedfmsl.algorithms.mixture import log_softmax

CLASSES, WIDTH = 4, 6


def samples(size: int, seed: int, classes: int = CLASSES) -> tuple[Floats, Labels]:
    """Features (n, F) with a full covariance, and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, size)
    means, mixing = rng.normal(3, 2, (CLASSES, WIDTH)), rng.normal(size=(WIDTH, WIDTH))
    return (means[labels] + rng.normal(size=(size, WIDTH)) @ mixing).astype(np.float32), labels


def head_of(features: Floats, labels: Labels, devices: int = 1) -> tuple[Floats, Floats]:
    """Weight (C, F) and bias (C,) from the sums of `devices` devices, which have every n-th sample each."""
    sums = [class_sums(features[i::devices], labels[i::devices], CLASSES) for i in range(devices)]
    moments = [second_moments(features[i::devices]) for i in range(devices)]
    totals = [np.sum([each[name] for each in sums], axis=0) for name in ("class_sums", "class_counts")]
    head = discriminant_head(*totals, np.sum(moments, axis=0))
    assert head.shape == (CLASSES * (WIDTH + 1),) and head.dtype == np.float32
    return head[: CLASSES * WIDTH].reshape(CLASSES, WIDTH), head[CLASSES * WIDTH :]


def reference_posterior(features: Floats, labels: Labels, at: Floats) -> Doubles:
    """The posterior (m, C) of Gaussians with one covariance and equal priors, at the temperature, sample by sample."""
    x = features.astype(np.float64)
    means = np.stack([x[labels == label].mean(axis=0) for label in range(CLASSES)])
    pooled = np.cov((x - means[labels]).T, ddof=0) * len(x) / (len(x) - CLASSES)
    shrunk = (1 - SHRINKAGE) * pooled + SHRINKAGE * np.trace(pooled) / WIDTH * np.eye(WIDTH)
    inverse = np.linalg.inv(shrunk)
    differences = at[:, None].astype(np.float64) - means
    log_densities = -0.5 * np.einsum("mcf,fg,mcg->mc", differences, inverse, differences)
    temperature = 1 + OVERCONFIDENCE * np.trace((1 - SHRINKAGE) * pooled @ inverse) / len(x)
    scaled = np.exp((log_densities - log_densities.max(axis=1, keepdims=True)) / temperature)
    return np.asarray(scaled / scaled.sum(axis=1, keepdims=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(40, 200), st.integers(0, 99))
def test_the_head_is_the_discriminant_of_all_samples_whatever_their_device(devices: int, size: int, seed: int) -> None:
    features, labels = samples(size, seed)
    labels[:CLASSES] = np.arange(CLASSES)
    weight, bias = head_of(features, labels, devices)
    at, _ = samples(20, seed + 1)
    expected = reference_posterior(features, labels, at)
    assert np.allclose(np.exp(log_softmax(at @ weight.T + bias)), expected, atol=1e-3)


@given(st.integers(0, 99))
def test_a_class_without_samples_never_wins(seed: int) -> None:
    features, labels = samples(50, seed, classes=CLASSES - 1)
    weight, bias = head_of(features, labels)
    assert not weight[-1].any()
    anywhere = np.random.default_rng(seed).normal(0, 20, (200, WIDTH)).astype(np.float32)
    assert ((anywhere @ weight.T + bias).argmax(axis=1) != CLASSES - 1).all()


@pytest.mark.parametrize("size", [1, 2, CLASSES])
def test_few_samples_give_a_finite_head(size: int) -> None:
    features, labels = samples(CLASSES, 0)[0][:size], np.arange(size)
    weight, bias = head_of(features, labels)
    assert np.isfinite(weight).all() and np.isfinite(bias).all()
    if size > 1:
        assert (features @ weight.T + bias).argmax(axis=1).tolist() == labels.tolist()


def test_no_samples_give_a_head_of_zeros() -> None:
    weight, bias = head_of(np.empty((0, WIDTH), np.float32), np.empty(0, np.int64))
    assert not weight.any() and not bias.any()


def test_second_moments_are_the_upper_triangle_row_by_row() -> None:
    features = np.array([[1, 2, 3], [0, 1, -1]], np.float32)
    assert second_moments(features).tolist() == [1, 2, 3, 5, 5, 10]


@given(st.integers(1, 60), st.integers(0, 99))
def test_the_scatter_is_the_sum_over_samples(size: int, seed: int) -> None:
    features, labels = samples(size, seed)
    sums = class_sums(features, labels, CLASSES)
    means = np.stack([features[labels == c].mean(axis=0) if (labels == c).any() else np.zeros(WIDTH) for c in range(4)])
    centred = features - means[labels]
    expected = sum(np.outer(row, row) for row in centred.astype(np.float64))
    scatter = within_scatter(sums["class_sums"], sums["class_counts"], second_moments(features))
    assert np.allclose(scatter, expected, atol=1e-5 * float((features**2).sum()))


def test_the_head_of_logit_sums_gives_the_discriminant_of_the_logits() -> None:
    features, labels = samples(150, 0)
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(CLASSES, WIDTH)), rng.normal(size=CLASSES)
    head = np.concatenate([weight.ravel(), bias]).astype(np.float32)
    logits = (features @ weight.T + bias).astype(np.float32)
    sums = class_sums(logits, labels, CLASSES)
    statistics = sums["class_sums"], sums["class_counts"], second_moments(logits)
    found, over_logits = logit_head(head, *statistics), discriminant_head(*statistics, LOGIT_SHRINKAGE)
    assert found.shape == head.shape and found.dtype == np.float32
    expected = logits @ over_logits[: CLASSES**2].reshape(CLASSES, CLASSES).T + over_logits[CLASSES**2 :]
    assert np.allclose(features @ found[:-CLASSES].reshape(CLASSES, WIDTH).T + found[-CLASSES:], expected, atol=1e-3)


def test_a_class_without_samples_keeps_its_former_row_at_the_new_scale() -> None:
    rng, counts = np.random.default_rng(0), np.array([3, 0, 5, 9], np.float32)
    former, head = (rng.normal(size=CLASSES * (WIDTH + 1)).astype(np.float32) for _ in range(2))
    at = rng.normal(size=(50, WIDTH))

    def logits(flat: Floats) -> Doubles:
        return np.asarray(at @ flat[:-CLASSES].reshape(CLASSES, WIDTH).T + flat[-CLASSES:], np.float64)

    found, held = logits(with_former_rows(head, former, counts)), counts > 0
    assert np.allclose(found[:, held], logits(head)[:, held], atol=1e-5)
    relative = logits(former) - logits(former)[:, held].mean(axis=1, keepdims=True)
    scale = found[:, 1] / relative[:, 1]
    assert scale.std() < 1e-5 and scale.mean() > 0
    nearly_none = np.array([3, 0, 0, 0], np.float32)
    assert np.array_equal(with_former_rows(head, former, nearly_none), former)
