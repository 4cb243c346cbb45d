"""The head in closed form: linear discriminant analysis of samples that nobody has in one place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfmsl.algorithms.arrays import Doubles, Floats, Labels
from fedfmsl.algorithms.class_means import class_sums
from fedfmsl.algorithms.discriminant import OVERCONFIDENCE, SHRINKAGE, discriminant_head, second_moments, within_scatter
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
