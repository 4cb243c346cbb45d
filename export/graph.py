"""A small ONNX graph builder, and the file that stores every frozen weight once.

Graphs contain standard operators of opset 20 and, for int8, one operator of ONNX Runtime (see `export.frozen`). ONNX
Runtime 1.19 or newer runs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 20
RUNTIME_DOMAIN = "com.microsoft"
VERSIONS = {"": OPSET, RUNTIME_DOMAIN: 1}
IR_VERSION = 9  # the oldest version that has opset 20; ONNX Runtime 1.17 reads it
ALIGNMENT = 4096  # page size, so that memory-mapped weights need no copy
WEIGHTS_FILE = "backbone.weights"
INLINE_BYTES = 4096  # larger constants are stored in the weight file

Array = NDArray[Any]
Dim = int | str


class WeightFile:
    """Frozen weights as ONNX external data. Equal tensors are stored once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets: dict[tuple[str, tuple[int, ...]], int] = {}
        self._size = 0

    def __enter__(self) -> WeightFile:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def tensor(self, name: str, array: Array) -> TensorProto:
        """Stores `array` and returns a tensor `name` that refers to it."""
        array = np.ascontiguousarray(array)
        data = array.tobytes()
        key = hashlib.sha256(data).hexdigest(), array.shape
        if key not in self._offsets:
            self._offsets[key] = -(-self._size // ALIGNMENT) * ALIGNMENT
            self._file.write(b"\0" * (self._offsets[key] - self._size))
            self._file.write(data)
            self._size = self._offsets[key] + len(data)
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": WEIGHTS_FILE, "offset": self._offsets[key], "length": len(data)}
        for entry, value in entries.items():
            tensor.external_data.add(key=entry, value=str(value))
        return tensor


class Graph:
    """Collects nodes. Names are numbered, so the same calls give the same bytes."""

    def __init__(self, name: str, weights: Mapping[str, Array], weight_file: WeightFile) -> None:
        self._name = name
        self._weights = weights
        self._weight_file = weight_file
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[Dim]) -> str:
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, tensor: str, name: str, shape: Sequence[Dim]) -> None:
        """Makes a float32 tensor of the graph an output with the given name."""
        self._nodes.append(helper.make_node("Identity", [tensor], [name]))
        self._outputs.append(_value_info(name, np.float32, shape))

    def frozen(self, key: str) -> str:
        """Adds a frozen weight of the backbone as a constant."""
        return self.stored(key, self._weights[key])

    def stored(self, name: str, array: Array) -> str:
        """Adds a constant that is stored in the weight file."""
        if name not in self._initializers:
            self._initializers[name] = self._weight_file.tensor(name, array)
        return name

    def weight(self, key: str) -> Array:
        """The values of a frozen weight."""
        return self._weights[key]

    def has(self, key: str) -> bool:
        """Whether the backbone has this frozen weight."""
        return key in self._weights

    def const(self, value: Any, dtype: type[np.generic] = np.float32) -> str:
        """Adds a constant. Small ones are stored in the graph itself. Equal constants share a name."""
        array = np.asarray(value, dtype)
        name = f"const.{array.dtype}.{hashlib.sha256(array.tobytes() + str(array.shape).encode()).hexdigest()[:12]}"
        if name not in self._initializers:
            inline = array.nbytes <= INLINE_BYTES
            self._initializers[name] = (
                numpy_helper.from_array(array, name) if inline else self._weight_file.tensor(name, array)
            )
        return name

    def parameter(self, name: str, shape: Sequence[int]) -> str:
        """Adds a trainable for onnxruntime-training: an initializer of zeros. A checkpoint has its values."""
        self._initializers[name] = numpy_helper.from_array(np.zeros(shape, np.float32), name)
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, np.int64)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output. Returns the name of the output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Adds a node. Returns the names of its outputs."""
        names = [f"{kind.lower()}.{len(self._nodes)}.{index}" for index in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, list(self._initializers.values())
        )
        domains = sorted({node.domain for node in self._nodes})
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(domain, VERSIONS[domain]) for domain in domains],
            ir_version=IR_VERSION,
            producer_name="fedfmsl-edge",
        )


def _value_info(name: str, dtype: type[np.generic], shape: Sequence[Dim]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))
