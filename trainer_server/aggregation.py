"""Aggregation of client updates, as functions over flat vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol.layout import Layout, Vector


def weighted_mean(current: Vector, layout: Layout, contributions: Sequence[tuple[Vector, float]]) -> Vector:
    """FedAvg per part of the layout: each part is the weighted mean over those who trained it (ours, see SAL).

    `contributions` are (vector, weight); a vector of a lower level holds only the first parts. A part that nobody
    trained keeps its `current` value. The sum runs in the order given, so the same order gives the same bits.
    """
    result = current.copy()
    for part in layout.parts.values():
        trained = [(vector[part], weight) for vector, weight in contributions if vector.size >= part.stop]
        total = sum(weight for _, weight in trained)
        if part.stop <= current.size and total > 0:
            mean = sum(np.asarray(values, np.float64) * (weight / total) for values, weight in trained)
            result[part] = np.asarray(mean, np.float32)
    return result


def weighted_average(values: Sequence[tuple[float, float]]) -> float:
    """Mean of (value, weight) pairs; 0 without any weight."""
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total else 0.0
