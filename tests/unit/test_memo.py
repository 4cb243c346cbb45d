"""Logits that are computed once, and again when what they depend on has changed."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.training.memo import Memo
from fedfmsl.algorithms.arrays import Floats


def test_the_most_recent_arrays_are_kept_within_the_limit() -> None:
    memo, computed = Memo(limit=2 * 40), list[str]()

    def recall(key: str, size: int = 10) -> Floats:
        def compute() -> Floats:
            computed.append(key)
            return np.full(size, ord(key), np.float32)

        return memo.recall(key, compute)

    for key in ("a", "b", "a", "c", "a", "b"):
        assert (recall(key) == ord(key)).all()
    assert computed == ["a", "b", "c", "b"]
    with pytest.raises(ValueError):
        recall("a")[0] = 1  # a caller cannot change what others receive
