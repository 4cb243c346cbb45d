"""Which updates take part in an average: those whose direction agrees with that of the others (ours).

    total = weighted_sums(read, directions(norms)[None], size)[0]
    found = agreements(devices, norms, sizes, total, read)
    recent = recent_agreements(found, former)
    kept = agreeing(recent)

An update that undoes what the others learn points away from them: also one of wrong labels, whose size and values are
inconspicuous. A single round says little of devices with different classes, so the mean of a device's rounds decides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from statistics import median

import numpy as np

from fedfmsl.algorithms.arrays import Doubles
from fedfmsl.algorithms.steps import dense
from fedfmsl.algorithms.vector_sums import Read, products

LEAST = 0.5  # of the median agreement: less takes no part
CHANCE = 0.1  # and this far below it, because all agreements approach zero as training converges
DECAY = 0.5  # of the weight of an earlier round
ROUNDING = 1e-9  # of the squared length of a sum of directions


def directions(norms: Sequence[float]) -> Doubles:
    """The weights (n,) with which the sum of vectors of these norms is that of their directions."""
    lengths = np.asarray(norms, np.float64)
    return np.divide(1, lengths, out=np.zeros(len(lengths)), where=lengths != 0)


def agreements(
    owners: Sequence[Hashable], norms: Sequence[float], sizes: Sequence[int], total: Doubles, read: Read
) -> list[float]:
    """For each vector (n,): the cosine between it and the sum of the directions of other owners' vectors.

    `owners`, `norms`, `sizes`: of each vector. `total` (P,), n ≤ P: the sum of all directions. `read` returns a vector
    by its index, and is called once for each, and more often for those of an owner of several. 0 for a vector of zeros,
    or without others.
    """
    times, of_owner = Counter(owners), defaultdict(list)
    for index, owner in enumerate(owners):
        if times[owner] > 1:  # else ten thousand lists
            of_owner[owner].append(index)
    alone = [index for index, owner in enumerate(owners) if times[owner] == 1]
    along = dict(zip(alone, products(read, alone, total), strict=True))
    weights, found = directions(norms), []
    squares = {size: float(np.square(total[:size]).sum()) for size in set(sizes)}
    for index, owner in enumerate(owners):
        others = [other for other in of_owner.get(owner, ()) if other != index]
        if others:
            vector = dense(read(index))
            rest = _without(total, others, weights, read)[: vector.size]
            product, square = float((vector * rest).sum()), float(np.square(rest).sum())
        else:
            product, square = along[index], squares[sizes[index]]
        found.append(_agreement(product, norms[index], square))
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


def _without(total: Doubles, indices: Iterable[int], weights: Doubles, read: Read) -> Doubles:
    """`total` without these vectors, each times its weight."""
    rest = total.copy()
    for index in indices:
        vector = dense(read(index))
        rest[: vector.size] -= np.multiply(vector, weights[index], dtype=np.float64)
    return rest


def _agreement(product: float, norm: float, square: float) -> float:
    """The cosine of a vector of this norm and a sum of directions without its own. `product`: of the vector and the
    sum with it; `square`: of the length of the sum with it."""
    if norm == 0:
        return 0.0
    along = product / norm
    others = square - 2 * along + 1
    return (along - 1) / others**0.5 if others > ROUNDING else 0.0
