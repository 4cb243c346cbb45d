"""A vector of 8-bit steps, as int8 updates are: each slot of it has a scale (ours).

A quarter of the bytes of the vector in float32, and sums over steps are sums of integers, which are exact in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Doubles, Vector
from fedfmsl.algorithms.bounds import l2_norm

EXACT = 1024  # squares of 8-bit steps, 2¹⁴ at most, whose sum is exact in float32


@dataclass(frozen=True, slots=True)
class Steps:
    """A vector (n,) of slots: `values` (of each slot, flat) times `scales`. `ends`: where the slots end, those behind
    the vector's end too."""

    values: tuple[NDArray[np.int8], ...]
    scales: Doubles
    ends: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.ends[len(self.values) - 1] if self.values else 0

    def norm(self) -> float:
        squares = [_sum_of_squares(values.astype(np.float32)) for values in self.values]
        return float(np.sqrt((np.square(self.scales) * squares).sum()))

    def dense(self) -> Vector:
        """The vector (n,) in float32."""
        vector = np.empty(self.size, np.float32)
        for span, steps, scale in zip(self.slots(), self.values, self.scales.astype(np.float32), strict=True):
            values = vector[span]
            values[:] = steps  # twice as fast as a product of mixed types
            values *= scale
        return vector

    def slots(self) -> list[slice]:
        return [slice(start, end) for start, end in pairwise((0, *self.ends[: len(self.values)]))]


Values = Vector | Steps


def dense(values: Values) -> Vector:
    return values.dense() if isinstance(values, Steps) else values


def norm_of(values: Values) -> float:
    """The L2 norm of a vector (n,)."""
    return values.norm() if isinstance(values, Steps) else l2_norm(values)


def _sum_of_squares(values: Vector) -> float:
    """Of 8-bit integers (n,), exact, so that it does not matter in which order BLAS adds."""
    count = values.size // EXACT
    rows, rest = values[: count * EXACT], values[count * EXACT :]
    squares = rows.reshape(count, 1, EXACT) @ rows.reshape(count, EXACT, 1)
    return sum(squares.ravel().tolist(), float(rest @ rest))
