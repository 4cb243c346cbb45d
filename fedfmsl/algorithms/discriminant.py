"""The closed-form head of stage 1: linear discriminant analysis from sums over all devices (ours).

Devices send sums only, so the head equals that of all samples in one place. The same idea with ridge regression is
analytic federated learning (He et al., CVPR 2025). By default they are sums of the C logits of the trained head, not of
the F features: `logit_head`. They reveal far less about single samples (benchmarks/membership.md).
"""

from __future__ import annotations

import numpy as np

from fedfmsl.algorithms.arrays import Doubles, Floats, Vector

Values = Floats | Doubles

SHRINKAGE = 1 / 3  # share of the scaled identity in the covariance; ours, chosen on held-out samples
LOGIT_SHRINKAGE = 0.1  # the same for the covariance of logits
# The covariance of few samples makes the head overconfident: on held-out samples the best temperature grew from 3 to 12
# with the effective degrees of freedom per sample, from 0.17 to 0.6, close to a line (ours).
OVERCONFIDENCE = 12.0
MIN_VARIANCE = 1e-12


def second_moments(features: Floats) -> Vector:
    """The upper triangle (F(F+1)/2,) of Σᵢ xᵢ xᵢᵀ over n features (n, F), row by row."""
    doubles = features.astype(np.float64)
    products = doubles.T @ doubles
    return np.asarray(products[np.triu_indices(len(products))], np.float32)


def within_scatter(sums: Values, counts: Values, moments: Values) -> Doubles:
    """Σᵢ (xᵢ - mᵢ)(xᵢ - mᵢ)ᵀ (F, F), with mᵢ the mean of the class of xᵢ. Arguments as in `discriminant_head`."""
    feature = sums.shape[1]
    products = np.zeros((feature, feature))
    products[np.triu_indices(feature)] = moments
    products += np.triu(products, 1).T
    return products - sums.astype(np.float64).T @ _means(sums, counts)


def discriminant_head(sums: Vector, counts: Vector, moments: Vector, shrinkage: float = SHRINKAGE) -> Vector:
    """The flat head, weight (C, F) and bias (C,), whose softmax is the posterior of classes with equal priors.

    `sums` (C, F), `counts` (C,) and `moments` (F(F+1)/2,) are of the features. Classes share the covariance within
    classes, which is shrunk towards a scaled identity by the share `shrinkage`. A class without samples has the weights
    zero and the lowest bias of the others, so it never wins over all of them. Without any samples the head is zero.
    """
    feature, means, samples = sums.shape[1], _means(sums, counts), float(counts.sum())
    held = counts > 0
    if not held.any():
        return np.zeros(means.size + len(means), np.float32)
    covariance = within_scatter(sums, counts, moments) / max(samples - held.sum(), 1.0)
    variance = max(float(np.trace(covariance)) / feature, MIN_VARIANCE)
    shrunk = (1 - shrinkage) * covariance + shrinkage * variance * np.eye(feature)
    freedom = float(np.trace(np.linalg.solve(shrunk, (1 - shrinkage) * covariance)))
    temperature = 1 + OVERCONFIDENCE * freedom / max(samples, 1.0)
    weight = np.linalg.solve(shrunk, means.T).T / temperature
    bias = -0.5 * (weight * means).sum(axis=1)
    weight[held] -= weight[held].mean(axis=0)  # equal shifts of all logits do not change a softmax
    bias[held] -= bias[held].mean()
    if not held.all():
        bias[~held] = bias[held].min()
    return np.concatenate([weight.ravel(), bias]).astype(np.float32)


def logit_head(head: Vector, sums: Vector, counts: Vector, moments: Vector) -> Vector:
    """The flat head whose logits are the discriminant of the logits z of `head`, in the same form.

    `sums` (C, C), `counts` (C,) and `moments` (C(C+1)/2,) are of z.
    """
    classes = len(counts)
    weight, bias = _rows(head, classes)
    mapping, shift = _rows(discriminant_head(sums, counts, moments, LOGIT_SHRINKAGE), classes)
    return np.concatenate([(mapping @ weight).ravel(), mapping @ bias + shift]).astype(np.float32)


def with_former_rows(head: Vector, former: Vector, counts: Vector) -> Vector:
    """The flat head with rows of the `former` one for classes without samples, by `counts` (C,).

    They are taken relative to the mean of the other rows, and at their new scale. If fewer than two classes have
    samples, the former head is returned.
    """
    held = counts > 0
    if held.sum() < 2:
        return former.copy()
    (weight, bias), (before, offset) = _rows(head, len(counts)), _rows(former, len(counts))
    before, offset = before - before[held].mean(axis=0), offset - offset[held].mean()
    scale = np.linalg.norm(weight[held]) / max(float(np.linalg.norm(before[held])), MIN_VARIANCE)
    weight[~held], bias[~held] = scale * before[~held], scale * offset[~held]
    return np.concatenate([weight.ravel(), bias]).astype(np.float32)


def _rows(head: Vector, classes: int) -> tuple[Doubles, Doubles]:
    """Weight (C, width) and bias (C,) of a flat head, in fp64."""
    values = head.astype(np.float64)
    return values[:-classes].reshape(classes, -1), values[-classes:]


def _means(sums: Values, counts: Values) -> Doubles:
    """Class means (C, F); zero for a class without samples."""
    samples = np.where(counts > 0, counts, 1).astype(np.float64)
    return np.where((counts > 0)[:, None], sums / samples[:, None], 0.0)
