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
    total, of_owner, norms = np.zeros(size), defaultdict(list), []
    for index, owner in enumerate(owners):
        vector = read(index)
        norms.append(l2_norm(vector))
        _add_direction(total, vector, norms[-1])
        of_owner[owner].append(index)
    squares: dict[int, float] = {}  # of the first n values of `total`, by n
    found = []
    for index, owner in enumerate(owners):
        vector, others = read(index), set(of_owner[owner]) - {index}
        rest = _without(total, others, norms, read)[: vector.size]
        square = None if others else squares.get(vector.size)
        if square is None:
            square = float(np.square(rest).sum())
        if not others:
            squares[vector.size] = square
        found.append(_agreement(vector, norms[index], rest, square))
    return found


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


def _add_direction(total: Doubles, vector: Vector, norm: float) -> None:
    """Adds the direction of a vector (n,) of this norm to the first n values of `total`; with -norm, subtracts it."""
    if norm != 0:
        total[: vector.size] += np.multiply(vector, 1 / norm, dtype=np.float64)


def _without(total: Doubles, indices: Iterable[int], norms: Sequence[float], read: Callable[[int], Vector]) -> Doubles:
    """`total` without the directions of these vectors."""
    if not (left_out := sorted(indices)):
        return total
    rest = total.copy()
    for index in left_out:
        _add_direction(rest, read(index), -norms[index])
    return rest


def _agreement(vector: Vector, norm: float, total: Doubles, square: float) -> float:
    """The cosine of a vector (n,) of this norm and `total` (n,) without the vector's direction. `square`: Σ total²."""
    if norm == 0:
        return 0.0
    along = float((vector * total).sum()) / norm
    others = square - 2 * along + 1
    return (along - 1) / others**0.5 if others > ROUNDING else 0.0
