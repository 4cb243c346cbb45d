"""The head that training starts from: class means of the frozen feature (FedNCM, Legate et al. 2023)."""

from __future__ import annotations

import numpy as np

from protocol.layout import Vector

SCALE = 20.0  # ours: how sharp the start is, in logits between the best and an orthogonal class


def head_of_class_means(sums: Vector, counts: Vector, norm_sum: float) -> Vector:
    """Sums (C, F) and counts (C,) of the feature per class, and the sum of all features' norms → the head, weight
    (C, F) and bias (C,), flat.

    The weights are the means' directions over the mean norm, so that logits are about SCALE · cosine while the head
    stays the linear one that transformers' classifiers have. A class nobody has gets zeros.
    """
    means = sums / np.maximum(counts, 1)[:, None]
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    mean_norm = max(norm_sum / max(float(counts.sum()), 1.0), 1e-12)
    weight = SCALE * means / np.maximum(lengths, 1e-12) / mean_norm
    return np.concatenate([weight.ravel(), np.zeros(len(counts))]).astype(np.float32)
