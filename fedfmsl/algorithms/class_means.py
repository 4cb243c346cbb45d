"""Heads that training starts from: class means of the frozen feature (FedNCM, Legate et al. 2023), or known
directions."""

from __future__ import annotations

import numpy as np

from fedfmsl.algorithms.arrays import Floats, Labels, Vector

SCALE = 20.0  # logits between the best class and an orthogonal one at the start (ours)
MIN_NORM = 1 / 64  # least mean feature norm, over √F (ours): only a norm with noise can be below it


def class_sums(features: Floats, labels: Labels, classes: int) -> dict[str, Vector]:
    """Sums of n features (n, F) per class (C, F), samples per class (C,), and the sum of the features' norms (1,)."""
    doubles = features.astype(np.float64)
    one_hot = np.eye(classes)[labels]
    return {
        "class_sums": (one_hot.T @ doubles).astype(np.float32),
        "class_counts": one_hot.sum(axis=0).astype(np.float32),
        "norm_sum": np.array([np.linalg.norm(doubles, axis=1).sum()], np.float32),
    }


def class_mean_head(sums: Vector, counts: Vector, norm_sum: float) -> Vector:
    """The head, weight (C, F) and bias (C,) as one flat vector, from class means.

    `sums` (C, F) and `counts` (C,) are of the features per class; `norm_sum` is the sum of the norms of all features.
    The row of a class without samples is zero.
    """
    means: Vector = np.asarray(sums / np.maximum(counts, 1)[:, None], np.float32)
    return direction_head(means, SCALE, counts, norm_sum)


def direction_head(directions: Vector, scale: float, counts: Vector, norm_sum: float) -> Vector:
    """The flat head whose rows have the given directions (C, F); `counts` (C,) and `norm_sum` are of all features.

    The weights are divided by the mean norm of the features. Logits are then about `scale` · cosine, and the head stays
    linear, as the classifiers of transformers are.
    """
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)
    mean_norm = max(norm_sum / max(float(counts.sum()), 1.0), MIN_NORM * directions.shape[1] ** 0.5)
    weight = scale * directions / np.maximum(lengths, 1e-12) / mean_norm
    return np.concatenate([weight.ravel(), np.zeros(len(counts))]).astype(np.float32)
