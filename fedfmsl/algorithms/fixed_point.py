"""Fixed-point numbers as integers modulo 2^64: their sums are exact in any order, as secure aggregation needs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Doubles

Words = NDArray[np.uint64]  # integers modulo 2^64

FRACTION_BITS = 20
LARGEST = 2.0**30  # absolute value of a number; the sum of 8192 of them does not wrap


def fixed_point(values: Doubles) -> Words:
    """Fixed-point numbers (P,) modulo 2^64. Raises ValueError if a value is not finite or larger than LARGEST."""
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= LARGEST:
        raise ValueError(f"a value of {largest:.4g} is too large; at most {LARGEST:.4g} is not")
    return np.rint(values * 2.0**FRACTION_BITS).astype(np.int64).view(np.uint64)


def numbers(words: Words) -> Doubles:
    """The inverse of `fixed_point`, also for a sum of its results."""
    return words.view(np.int64) / 2.0**FRACTION_BITS
