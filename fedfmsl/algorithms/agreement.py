"""Which updates take part in an average: those whose direction agrees with that of the others (ours).

    found = agreements(devices, size, read)
    recent = recent_agreements(found, former)
    kept = agreeing(recent)

An update that undoes what the others learn points away from them: also one of wrong labels, whose size and values are
inconspicuous. A single round says little of devices with different classes, so the mean of a device's rounds decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import median

import numpy as np

from fedfmsl.algorithms.arrays import Doubles, Vector
from fedfmsl.algorithms.bounds import l2_norm

LEAST = 0.5  # of the median agreement: less takes no part
CHANCE = 0.1  # and this far below it, because all agreements approach zero as training converges
DECAY = 0.5  # of the weight of an earlier round
ROUNDING = 1e-9  # of the squared length of a sum of directions


def agreements(owners: Sequence[Hashable], size: int, read: Callable[[int], Vector]) -> list[float]:
    """For each vector (n,), n ≤ `size`: the cosine between it and the sum of the directions of other owners' vectors.

    `owners`: of each vector. `read` returns a vector by its index, and is called twice for each, and more often for
    those of an owner of several. 0 for a vector of zeros, or without others.
    """
    total, of_owner = np.zeros(size), defaultdict(list)
    for index, owner in enumerate(owners):
        _add_direction(total, read(index), 1.0)
        of_owner[owner].append(index)
    return [
        _agreement(read(index), _without(total, set(of_owner[owner]) - {index}, read))
        for index, owner in enumerate(owners)
    ]


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


def _add_direction(total: Doubles, vector: Vector, sign: float) -> None:
    """Adds the direction of a vector (n,) to the first n values of `total`."""
    norm = l2_norm(vector)
    if norm > 0:
        total[: vector.size] += sign * (vector / np.float64(norm))


def _without(total: Doubles, indices: Iterable[int], read: Callable[[int], Vector]) -> Doubles:
    """`total` without the directions of these vectors."""
    if not (left_out := sorted(indices)):
        return total
    rest = total.copy()
    for index in left_out:
        _add_direction(rest, read(index), -1.0)
    return rest


def _agreement(vector: Vector, total: Doubles) -> float:
    """The cosine of a vector (n,) and the first n values of `total` without its own direction."""
    norm, total = l2_norm(vector), total[: vector.size]
    if norm == 0:
        return 0.0
    along = float((vector * total).sum()) / norm
    others = float(np.square(total).sum()) - 2 * along + 1
    return (along - 1) / others**0.5 if others > ROUNDING else 0.0
