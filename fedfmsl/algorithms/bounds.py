"""Bounds on what one contribution can change, relative to the contributions of the others (ours).

    weights = capped_weights(samples)
    limit = norm_limit(norms, recent)

They hold while fewer than half of the contributions are hostile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median, median_low

import numpy as np

from fedfmsl.algorithms.arrays import Vector

WEIGHT_CAP = 1.5  # times the median weight; of ten honest devices of the benchmark about one is above it
SUMS_CAP = 1.0  # the same for samples in class sums, in which every sample counts
NORM_FACTOR = 2.0  # times the median norm; honest updates of the trial have at most 1.5
NORM_ROUNDS = 5  # earlier rounds that the median norm is of


def capped_weights(weights: Sequence[float], cap: float = WEIGHT_CAP) -> list[float]:
    """The weights, none above `cap` times the median of the positive ones."""
    positive = [weight for weight in weights if weight > 0]
    limit = cap * median(positive) if positive else 0.0
    return [min(weight, limit) for weight in weights]


def l2_norm(vector: Vector) -> float:
    """The L2 norm of a vector (n,). Not by BLAS: the last bit of its sum depends on the number of threads."""
    return float(np.sqrt(np.square(vector, dtype=np.float64).sum()))


def norm_limit(norms: Sequence[float], recent: Sequence[float] = (), factor: float = NORM_FACTOR) -> float:
    """`factor` times the median of this round's median norm and those of earlier rounds, `recent` (of two the lower).

    So a single round in which hostile updates are the majority does not raise it far. Infinite without any norms.
    """
    medians = [*recent, *([median(norms)] if norms else [])]
    return factor * median_low(medians) if medians else math.inf
