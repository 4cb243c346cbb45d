"""Fixed-point numbers as integers modulo 2^64: their sums are exact in any order, as secure aggregation needs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Doubles

Words = NDArray[np.uint64]  # integers modulo 2^64

FRACTION_BITS = 20
TOTAL_BITS = 50  # of a number; the sum of 8192 of them does not wrap
LARGEST = 2.0 ** (TOTAL_BITS - FRACTION_BITS)  # absolute value of a number


def fixed_point(values: Doubles, bits: int = FRACTION_BITS) -> Words:
    """Numbers (P,) with `bits` after the point, modulo 2^64. Raises ValueError if one is not finite or too large."""
    largest, limit = float(np.abs(values).max(initial=0.0)), 2.0 ** (TOTAL_BITS - bits)
    if not largest <= limit:
        raise ValueError(f"a value of {largest:.4g} is too large, more than {limit:.4g}")
    return np.rint(values * 2.0**bits).astype(np.int64).view(np.uint64)


def numbers(words: Words, bits: int = FRACTION_BITS) -> Doubles:
    """The inverse of `fixed_point`, also for a sum of its results."""
    return words.view(np.int64) / 2.0**bits
