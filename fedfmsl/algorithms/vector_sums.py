"""Weighted sums and inner products of many vectors that are read one at a time (ours).

    sums = weighted_sums(read, weights, size)
    found = products(read, indices, vector)

The same vectors in the same order give the same bits, on every processor and with any number of threads. So vectors in
float32 are added without BLAS, whose order of summation differs. Of 8-bit steps a block of rows is one BLAS product of
integers, which is exact in any order, because float64 holds them all: 7 bits of a step, ROWS or WIDTH addends, and
coefficients of as many bits as are left.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Doubles
from fedfmsl.algorithms.steps import Steps, Values

ROWS_BITS, WIDTH_BITS, STEP_BITS, DOUBLE_BITS = 6, 11, 7, 53
ROWS = 1 << ROWS_BITS  # of a block, at most
WIDTH = 1 << WIDTH_BITS  # columns that are multiplied at a time; ROWS × WIDTH numbers fit in a processor's cache
BLOCK_BYTES = 4 * 1024 * 1024
PIECE = 1 << 13  # values of a float32 vector that are added at a time

Read = Callable[[int], Values]


def weighted_sums(read: Read, weights: Doubles, size: int) -> Doubles:
    """Σᵢ `weights[k, i]` · xᵢ for each k, (k, size). `read(i)` gives xᵢ (n,), n ≤ `size`, whose other values are 0.
    Vectors without a weight are not read."""
    sums = np.zeros((len(weights), size))
    for rows in _blocks(read, np.flatnonzero(weights.any(axis=0)).tolist(), size):
        if isinstance(rows, _Block):
            rows.add_to(sums, weights[:, rows.indices])
        else:
            index, vector = rows
            for start in range(0, vector.size, PIECE):
                values = vector[start : start + PIECE].astype(np.float64)
                for total, weight in zip(sums, weights[:, index], strict=True):
                    total[start : start + values.size] += values * weight
    return sums


def products(read: Read, indices: Iterable[int], vector: Doubles) -> list[float]:
    """xᵢ · `vector` (P,) for each index, where xᵢ (n,), n ≤ P, goes with the first n values."""
    found: list[float] = []
    integers: tuple[Doubles, Doubles] | None = None
    for rows in _blocks(read, indices, vector.size):
        if isinstance(rows, _Block):
            integers = integers or _integers_of(vector)
            found += rows.products(*integers)
        else:
            found.append(float((rows[1] * vector[: rows[1].size]).sum()))
    return found


class _Block:
    """Some vectors of steps as the rows of a matrix."""

    def __init__(self, ends: tuple[int, ...], size: int) -> None:
        self.ends = ends
        self.indices: list[int] = []
        slots = [end for end in ends if end <= size]
        self._values = np.zeros((min(ROWS, max(BLOCK_BYTES // size, 1)), size), np.int8)
        self._scales = np.zeros((len(self._values), len(slots)))
        cuts = sorted({0, *slots, *range(0, slots[-1], WIDTH)})
        self._pieces = [(slice(*cut), bisect(slots, cut[0])) for cut in pairwise(cuts)]

    @property
    def is_full(self) -> bool:
        return len(self.indices) == len(self._values)

    def append(self, index: int, steps: Steps) -> None:
        values, scales = self._values[len(self.indices)], self._scales[len(self.indices)]
        for span, own in zip(steps.slots(), steps.values, strict=True):
            values[span] = own
        values[steps.size :] = 0
        scales[: len(steps.scales)], scales[len(steps.scales) :] = steps.scales, 0
        self.indices.append(index)

    def add_to(self, sums: Doubles, weights: Doubles) -> None:
        """Adds the sum of the rows with these weights (k, rows) to each of the `sums` (k, size)."""
        coefficients = weights[:, None] * self._scales[: len(self.indices)].T  # (k, slots, rows)
        integers, units = _integers(coefficients, DOUBLE_BITS - STEP_BITS - ROWS_BITS)
        for columns, slot in self._pieces:
            sums[:, columns] += (integers[:, slot] @ self._columns(columns)) * units[:, slot]

    def products(self, integers: Doubles, units: Doubles) -> list[float]:
        """Of each row and the vector whose values are `integers` (size,), each WIDTH of them times one of `units`."""
        scales = self._scales[: len(self.indices)].T
        found = np.zeros(len(self.indices))
        for columns, slot in self._pieces:
            exact = self._columns(columns) @ integers[columns]
            found += exact * units[columns.start // WIDTH] * scales[slot]
        return found.tolist()

    def _columns(self, columns: slice) -> Doubles:
        return self._values[: len(self.indices), columns].astype(np.float64)


def _blocks(read: Read, indices: Iterable[int], size: int) -> Iterator[_Block | tuple[int, NDArray[np.float32]]]:
    """Each vector in float32, and blocks of those of steps."""
    block: _Block | None = None
    for index in indices:
        values = read(index)
        if not isinstance(values, Steps):
            yield index, values
            continue
        if block is not None and (block.is_full or block.ends != values.ends):
            yield block
            block.indices.clear()
        if block is None or block.ends != values.ends:
            block = _Block(values.ends, size)
        block.append(index, values)
    if block is not None:
        yield block


def _integers_of(vector: Doubles) -> tuple[Doubles, Doubles]:
    """The values of a vector (P,) as integers (P,) times one unit for each WIDTH of them."""
    rows = np.zeros((-(-vector.size // WIDTH), WIDTH))
    rows.ravel()[: vector.size] = vector
    integers, units = _integers(rows, DOUBLE_BITS - STEP_BITS - WIDTH_BITS)
    return integers.ravel()[: vector.size], units[:, 0]


def _integers(values: Doubles, bits: int) -> tuple[Doubles, Doubles]:
    """Values (…, n) as integers (…, n) of at most 2^`bits`, rounded, times powers of two, their units (…, 1)."""
    _, exponents = np.frexp(np.abs(values).max(axis=-1, keepdims=True))
    return np.rint(np.ldexp(values, bits - exponents)), np.ldexp(1.0, exponents - bits)
