"""Attacks on sums over photos: whose photos are in a sum, and what a photo's feature is. Pure functions (ours).

    weights = least_squares_weights(candidates, total)
    weights = linear_weights(gram, products, prior)
    balanced_accuracy(weights, members, labels)

The attacker has candidate photos and computes their features or logits. It looks for weights, 1 for a member and 0 for
any other photo, with which the candidates have the total that it has seen. m candidates, D values of each, N numbers in
the total.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from fedfmsl.algorithms.arrays import Bools, Doubles, Labels

ROUNDING = 1e-9  # of the numbers in fp32 sums, relative to their mean square
TINY = float(np.finfo(np.float64).tiny)


def least_squares_weights(candidates: Doubles, total: Doubles) -> Doubles:
    """The weights (m,), none negative, with which candidates (m, D) are nearest to their total (D,)."""
    return np.asarray(nnls(candidates.T, total, maxiter=100 * len(candidates))[0], np.float64)


def linear_weights(gram: Doubles, products: Doubles, prior: float) -> Doubles:
    """The best linear estimate of the weights (m,) of candidates that are members with probability `prior` each.

    With terms (m, N), what each candidate adds to the total (N,) if it is a member, `gram` is terms · termsᵀ (m, m),
    and `products` is terms · total (m,). If the total has few numbers, many weights fit it, and this is the better
    attack.
    """
    variance, scale = prior * (1 - prior), max(float(np.trace(gram)), TINY)
    known = variance * gram / scale + ROUNDING * np.eye(len(gram))
    rest = (products - prior * gram.sum(axis=1)) / scale
    return np.asarray(prior + variance * np.linalg.solve(known, rest), np.float64)


def class_gram(values: Doubles, labels: Labels) -> Doubles:
    """The `gram` of class sums and counts: what samples with values (m, D) add to them."""
    return np.asarray((values @ values.T + 1) * (labels[:, None] == labels), np.float64)


def moment_gram(values: Doubles) -> Doubles:
    """The `gram` of second moments, the upper triangle of Σ x xᵀ over values (m, D)."""
    return np.asarray(((values @ values.T) ** 2 + (values**2) @ (values**2).T) / 2, np.float64)


def balanced_accuracy(weights: Doubles, members: Bools, labels: Labels) -> float:
    """The mean of the shares of members and of other candidates (m,) that the attacker tells. Chance is 0.5.

    It knows how many members each class has, and takes those with the largest weights.
    """
    guessed = np.zeros(len(members), np.bool_)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        guessed[own[np.argsort(-weights[own], kind="stable")[: int(members[own].sum())]]] = True
    shares = [float(np.mean(guessed[kind] == members[kind])) for kind in (members, ~members) if kind.any()]
    return float(np.mean(shares))


def feature_from_logits(weight: Doubles, logits: Doubles, mean: Doubles) -> Doubles:
    """The feature (F,) nearest to `mean` (F,) with these logits (C,) under a head of weight (C, F), without bias."""
    return np.asarray(mean + np.linalg.pinv(weight) @ (logits - weight @ mean), np.float64)


def cosine(a: Doubles, b: Doubles) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), TINY))
