"""Client updates as vectors whose sum gives their weighted mean, for secure aggregation (ours).

    vector = weighted_update(delta, weight, accuracy, parts)
    mean, accuracy = weighted_mean(sum_of_vectors, parts)

The sum holds, for each part, the weights of the devices that trained it. So devices of different levels have one sum.
"""

from __future__ import annotations

import numpy as np

from fedfmsl.algorithms.aggregation import Aggregate
from fedfmsl.algorithms.arrays import Doubles, Parts, Vector

FRACTION_BITS = 30  # of fixed-point numbers: up to a million, in steps of 1e-9


def trained_values(parts: Parts) -> int:
    """P, the number of values in all parts."""
    return int(max(span.stop for span in parts.values()))


def weighted_values(parts: Parts) -> int:
    """The length of a vector."""
    return trained_values(parts) + len(parts) + 1


def weighted_update(delta: Vector | Doubles, weight: float, accuracy: float, parts: Parts) -> Doubles:
    """The vector (P + number of parts + 1,) of an update (p ≤ P,) that ends where a part ends. `parts` end at P."""
    spans = list(parts.values())
    vector = np.zeros(weighted_values(parts))
    vector[: delta.size] = weight * np.asarray(delta, np.float64)
    vector[spans[-1].stop : -1] = [weight if span.stop <= delta.size else 0.0 for span in spans]
    vector[-1] = weight * accuracy
    return vector


def weighted_mean(total: Doubles, parts: Parts) -> tuple[Aggregate, float]:
    """The mean update (P,) and the mean accuracy from the sum of such vectors. A part without weight is not trained."""
    spans = list(parts.values())
    weights = total[spans[-1].stop : -1]
    delta = np.zeros(spans[-1].stop)
    trained = []
    for span, weight in zip(spans, weights, strict=True):
        if weight > 0:
            delta[span] = total[span] / weight
            trained.append(span)
    return Aggregate(delta, tuple(trained)), float(total[-1] / weights[0]) if weights[0] > 0 else 0.0
