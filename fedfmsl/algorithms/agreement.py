"""Which updates take part in an average: those whose direction agrees with that of the others (ours).

    found = agreements(rows, sizes)
    recent = recent_agreements(found, former)
    kept = agreeing(recent)

An update that undoes what the others learn points away from them: also one of wrong labels, whose size and values are
inconspicuous. A single round says little of devices with different classes, so the mean of a device's rounds decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from fedfmsl.algorithms.arrays import Doubles, Vector
from fedfmsl.algorithms.bounds import l2_norm

LEAST = 0.5  # of the median agreement: less takes no part
CHANCE = 0.1  # and this far below it, because all agreements approach zero as training converges
DECAY = 0.5  # of the weight of an earlier round
ROUNDING = 1e-9  # of the squared length of a sum of directions


def agreements(count: int, size: int, read: Callable[[int], Vector]) -> list[float]:
    """For each of `count` vectors (n,), n ≤ `size`: the cosine between it and the sum of the other ones' directions.

    `read` returns a vector by its index, and is called twice for each. 0 for a vector of zeros, or without others.
    """
    total = np.zeros(size)
    for index in range(count):
        vector = read(index)
        norm = l2_norm(vector)
        if norm > 0:
            total[: vector.size] += vector / np.float64(norm)
    return [_agreement(read(index), total) for index in range(count)]


def recent_agreements(found: Sequence[float], former: Sequence[float | None]) -> list[float]:
    """The mean of the rounds, of which the latest counts most. `former` is that of the rounds before; None, of a new
    device, counts as the median of this round."""
    usual = median(found) if found else 0.0
    pairs = zip(found, former, strict=True)
    return [DECAY * (usual if before is None else before) + (1 - DECAY) * now for now, before in pairs]


def agreeing(recent: Sequence[float]) -> list[bool]:
    """Which of the agreements are high enough; at least half of them."""
    usual = median(recent) if recent else 0.0
    return [each >= usual - max((1 - LEAST) * usual, CHANCE) for each in recent]


def _agreement(vector: Vector, total: Doubles) -> float:
    """The cosine of a vector (n,) and the first n values of `total` without its own direction."""
    norm, total = l2_norm(vector), total[: vector.size]
    if norm == 0:
        return 0.0
    along = float((vector * total).sum()) / norm
    others = float(np.square(total).sum()) - 2 * along + 1
    return (along - 1) / others**0.5 if others > ROUNDING else 0.0
