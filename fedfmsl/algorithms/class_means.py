"""The heads that training can start from: class means of the frozen feature (FedNCM, Legate et al. 2023), or directions
known beforehand."""

from __future__ import annotations

import numpy as np

from fedfmsl.algorithms.arrays import Floats, Labels, Vector

SCALE = 20.0  # ours: how sharp the start is, in logits between the best and an orthogonal class
LEAST_NORM = 1 / 64  # of a mean feature norm, over √F (ours): no backbone's is as short, but privacy's noise can say so


def class_sums(features: Floats, labels: Labels, classes: int) -> dict[str, Vector]:
    """Sums of n features (n, F) per class (C, F), samples per class (C,), and the sum of the features' norms (1,)."""
    doubles = features.astype(np.float64)
    one_hot = np.eye(classes)[labels]
    return {
        "class_sums": (one_hot.T @ doubles).astype(np.float32),
        "class_counts": one_hot.sum(axis=0).astype(np.float32),
        "norm_sum": np.array([np.linalg.norm(doubles, axis=1).sum()], np.float32),
    }


def head_of_class_means(sums: Vector, counts: Vector, norm_sum: float) -> Vector:
    """Sums (C, F) and counts (C,) of the feature per class, and the sum of all features' norms → the head, weight
    (C, F) and bias (C,), flat. A class nobody has gets zeros."""
    means: Vector = np.asarray(sums / np.maximum(counts, 1)[:, None], np.float32)
    return head_along(means, SCALE, counts, norm_sum)


def head_along(directions: Vector, scale: float, counts: Vector, norm_sum: float) -> Vector:
    """The head, flat, that looks along `directions` (C, F); counts (C,) and the sum of norms are all features'.

    The weights are divided by the features' mean norm, so that logits are about `scale` · cosine while the head stays
    the linear one that transformers' classifiers have.
    """
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    mean_norm = max(norm_sum / max(float(counts.sum()), 1.0), LEAST_NORM * directions.shape[1] ** 0.5)
    weight = scale * directions / np.maximum(lengths, 1e-12) / mean_norm
    return np.concatenate([weight.ravel(), np.zeros(len(counts))]).astype(np.float32)
