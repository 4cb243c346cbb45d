"""Products with the frozen weights of a backbone: in float32, or with int8 weights (ours).

An int8 product takes weights with one scale per output, and rows of activations or gradients that are quantised on the
spot, each row with a scale of its own: the class token's gradient is larger than the others' by far, and what a row
becomes must not depend on which images share its batch. The product itself is MatMulInteger, in ONNX Runtime's own form
that scales the result while it is written (every ONNX Runtime has it; two passes over memory less).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from export.graph import RUNTIME_DOMAIN, Array, Graph

LARGEST = 127  # of a signed byte, used symmetrically
ZERO_POINT = 128  # of unsigned bytes: runtimes multiply unsigned with signed fastest
TINY = 1e-30


class Frozen(Protocol):
    """The frozen projections of one graph; `key.weight` is (I, O)."""

    def linear(self, x: str, key: str) -> str:
        """x W + b: (·, I) → (·, O)."""

    def product(self, x: str, key: str) -> str:
        """x W: (·, I) → (·, O)."""

    def transposed(self, x: str, key: str) -> str:
        """x Wᵀ: (·, O) → (·, I)."""


class Float32:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def linear(self, x: str, key: str) -> str:
        return self._graph.op("Gemm", x, self._graph.frozen(f"{key}.weight"), self._graph.frozen(f"{key}.bias"))

    def product(self, x: str, key: str) -> str:
        return self._graph.op("Gemm", x, self._graph.frozen(f"{key}.weight"))

    def transposed(self, x: str, key: str) -> str:
        return self._graph.op("Gemm", x, self._graph.frozen(f"{key}.weight"), transB=1)


class Int8:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._rows: dict[str, tuple[str, str]] = {}

    def linear(self, x: str, key: str) -> str:
        return self._graph.op("Add", self.product(x, key), self._graph.frozen(f"{key}.bias"))

    def product(self, x: str, key: str) -> str:
        weight, scale = self._weight(key)
        return self._times(x, weight, scale)

    def transposed(self, x: str, key: str) -> str:
        weight, scale = self._weight(key)
        turned = self._graph.op("Transpose", weight, perm=[1, 0])
        return self._times(self._graph.op("Mul", x, scale), turned, self._graph.const(1.0))

    def _times(self, x: str, weight: str, scale: str) -> str:
        op, const = self._graph.op, self._graph.const
        rows, row_scale = self._quantised(x)
        inputs = rows, weight, const(1.0), scale, const(ZERO_POINT, np.uint8)
        return op("Mul", op("MatMulIntegerToFloat", *inputs, domain=RUNTIME_DOMAIN), row_scale)

    def _quantised(self, x: str) -> tuple[str, str]:
        """Unsigned bytes (M, K) and the scale (M, 1) of each row of x (M, K)."""
        if x not in self._rows:
            op, const, last = self._graph.op, self._graph.const, self._graph.ints(-1)
            largest = op("Max", op("ReduceMax", op("Abs", x), last), const(TINY))
            scale = op("Mul", largest, const(1 / LARGEST))
            flat = op("Squeeze", scale, last)
            zero_point = op("Expand", const(ZERO_POINT, np.uint8), op("Shape", flat))
            self._rows[x] = op("QuantizeLinear", x, flat, zero_point, axis=0), scale
        return self._rows[x]

    def _weight(self, key: str) -> tuple[str, str]:
        weight, scale = quantise(self._graph.weight(f"{key}.weight"))
        return self._graph.stored(f"{key}.int8", weight), self._graph.stored(f"{key}.scale", scale)


def quantise(weight: Array) -> tuple[Array, Array]:
    """Signed bytes (I, O) and the scale (O,) of each column."""
    scale = np.maximum(np.abs(weight).max(axis=0), TINY).astype(np.float32) / np.float32(LARGEST)
    return np.rint(weight / scale).astype(np.int8), scale


PRECISIONS: dict[str, Callable[[Graph], Frozen]] = {"fp32": Float32, "int8": Int8}
