"""Matrix products with frozen weights, in float32, float16 or int8 (ours).

An int8 product uses weights with one scale per output. It quantizes activations and gradients at run time, with one
scale per row, for two reasons. The gradient of the class token is much larger than the others. And the result for a
sample must not depend on the other samples of its batch.

The operator is ONNX Runtime's MatMulIntegerToFloat, which every release has. It scales the result while it writes it,
and so saves two passes over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from onnx import TensorProto

from export.graph import RUNTIME_DOMAIN, Array, Graph

LARGEST = 127  # the signed byte's range is used symmetrically
ZERO_POINT = 128  # of activations, which are unsigned, because unsigned times signed is the fastest product
TINY = 1e-30


class Frozen(Protocol):
    """Adds products with frozen projections to one graph. `key.weight` is (I, O), `key.bias` (O,)."""

    def linear(self, x: str, key: str) -> str:
        """x W + b: (·, I) → (·, O)."""

    def product(self, x: str, key: str) -> str:
        """x W: (·, I) → (·, O)."""

    def transposed(self, x: str, key: str) -> str:
        """x Wᵀ: (·, O) → (·, I)."""


class Float32:
    """Products in float32."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def linear(self, x: str, key: str) -> str:
        return self._graph.op("Gemm", x, self._graph.frozen(f"{key}.weight"), self._graph.frozen(f"{key}.bias"))

    def product(self, x: str, key: str) -> str:
        return self._graph.op("Gemm", x, self._graph.frozen(f"{key}.weight"))

    def transposed(self, x: str, key: str) -> str:
        return self._graph.op("Gemm", x, self._graph.frozen(f"{key}.weight"), transB=1)


class Float16:
    """Products in float16 between tensors in float32, for GPUs. The weights stay float32 in the file, which has them
    once for both kinds of graphs. ONNX Runtime converts them when it loads a graph.

    On a processor ONNX Runtime multiplies in float32, and removes a cast that follows another one. Then it would not
    round as a GPU does, and the graphs could not be tested. So a Reshape, which copies nothing, is between two casts.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._halves: dict[str, str] = {}  # tensors in float16, by name

    def linear(self, x: str, key: str) -> str:
        return self._gemm(x, key, self._weight(f"{key}.bias"))

    def product(self, x: str, key: str) -> str:
        return self._gemm(x, key)

    def transposed(self, x: str, key: str) -> str:
        return self._gemm(x, key, transB=1)

    def _gemm(self, x: str, key: str, *bias: str, **attributes: int) -> str:
        if x not in self._halves:
            self._halves[x] = self._same_shape(self._cast(x, TensorProto.FLOAT16))
        y = self._graph.op("Gemm", self._halves[x], self._weight(f"{key}.weight"), *bias, **attributes)
        return self._cast(self._same_shape(y), TensorProto.FLOAT)

    def _weight(self, name: str) -> str:
        if name not in self._halves:
            self._halves[name] = self._cast(self._graph.frozen(name), TensorProto.FLOAT16)
        return self._halves[name]

    def _cast(self, x: str, to: int) -> str:
        return self._graph.op("Cast", x, to=to)

    def _same_shape(self, x: str) -> str:
        return self._graph.op("Reshape", x, self._graph.ints(0, -1))


class Int8:
    """Products with int8 weights and activations."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._rows: dict[str, tuple[str, str]] = {}

    def linear(self, x: str, key: str) -> str:
        return self._graph.op("Add", self.product(x, key), self._graph.frozen(f"{key}.bias"))

    def product(self, x: str, key: str) -> str:
        weight, scale = self._weight(key)
        return self._matmul(x, weight, scale)

    def transposed(self, x: str, key: str) -> str:
        weight, scale = self._weight(key)
        transposed = self._graph.op("Transpose", weight, perm=[1, 0])
        return self._matmul(self._graph.op("Mul", x, scale), transposed, self._graph.const(1.0))

    def _matmul(self, x: str, weight: str, scale: str) -> str:
        op, const = self._graph.op, self._graph.const
        rows, row_scale = self._quantize_rows(x)
        inputs = rows, weight, const(1.0), scale, const(ZERO_POINT, np.uint8)
        return op("Mul", op("MatMulIntegerToFloat", *inputs, domain=RUNTIME_DOMAIN), row_scale)

    def _quantize_rows(self, x: str) -> tuple[str, str]:
        """Unsigned bytes (M, K) and scales (M, 1) of the rows of x (M, K). Nodes are added once for each x."""
        if x not in self._rows:
            op, const, last = self._graph.op, self._graph.const, self._graph.ints(-1)
            largest = op("Max", op("ReduceMax", op("Abs", x), last), const(TINY))
            scale = op("Mul", largest, const(1 / LARGEST))
            flat = op("Squeeze", scale, last)
            zero_point = op("Expand", const(ZERO_POINT, np.uint8), op("Shape", flat))
            self._rows[x] = op("QuantizeLinear", x, flat, zero_point, axis=0), scale
        return self._rows[x]

    def _weight(self, key: str) -> tuple[str, str]:
        weight, scale = quantize(self._graph.weight(f"{key}.weight"))
        return self._graph.stored(f"{key}.int8", weight), self._graph.stored(f"{key}.scale", scale)


def quantize(weight: Array) -> tuple[Array, Array]:
    """Signed bytes (I, O) and scales (O,) of the columns of `weight` (I, O)."""
    scale = np.maximum(np.abs(weight).max(axis=0), TINY).astype(np.float32) / np.float32(LARGEST)
    return np.rint(weight / scale).astype(np.int8), scale


PRECISIONS: dict[str, Callable[[Graph], Frozen]] = {"fp32": Float32, "fp16": Float16, "int8": Int8}
