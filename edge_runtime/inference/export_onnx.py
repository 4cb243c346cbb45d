"""Writes the personalized model, MoFM of global expert, local expert and gate, as one self-contained ONNX file.

The bundle has a template with experts as inputs and weights as external data. This module turns the experts
into constants and copies the weights into the file. Besides this module, only `model_folder` needs the onnx package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from edge_runtime.store import DeviceStore
from edge_runtime.training.adoption import SCORES
from edge_runtime.training.personal_model import ModelHeader
from edge_runtime.training.stored_model import mark_exported, open_model_bundle, read_personal_model
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.task_bundle import TaskBundle

# Numbers of fields in onnx.proto
MODEL_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
GRAPH_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
TENSOR_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
LENGTH_DELIMITED = 2  # protobuf's type of a field that starts with its length


def write_model(store: DeviceStore, path: Path, bundle_path: Path | None = None) -> None:
    """Writes the device's newest model to `path`. Default bundle: the one that the device downloaded.

    Raises InputError if the device has no personalized model yet, BundleError if its bundle is missing or another one.
    """
    personal = assemble(store, bundle_path)
    manifest = personal.bundle.manifest
    files = {
        "classes": json.dumps(personal.bundle.classes),
        "preprocessing": manifest.preprocessing.model_dump_json(),
        "tokenizer": personal.bundle.tokenizer(),
    }
    onnx.helper.set_model_props(personal.model, {**personal.origin, **files})
    write_atomically(path, serialized(personal.model, personal.frozen, personal.bundle))
    if path == store.personalized:
        mark_exported(store, personal.header)


@dataclass(frozen=True)
class AssembledModel:
    """The device's model with its experts as constants. `frozen`: the weights, which `serialized` adds from the
    bundle."""

    header: ModelHeader
    bundle: TaskBundle
    model: onnx.ModelProto
    frozen: Sequence[onnx.TensorProto]

    @property
    def origin(self) -> dict[str, str]:
        """Where the model comes from, and its calibration, as metadata of the ONNX file."""
        origin = self.header.model_dump(exclude=set(SCORES))
        values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in origin.items()}
        return {**values, "model": self.bundle.manifest.model}


def assemble(store: DeviceStore, bundle_path: Path | None) -> AssembledModel:
    """Raises as `write_model` does."""
    personal = read_personal_model(store)
    header, tensors = personal.header, personal.inputs
    bundle = open_model_bundle(store, header, bundle_path)
    model = onnx.load(str(bundle.path(f"personal-{header.level}.onnx")), load_external_data=False)
    frozen = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    small = [tensor for tensor in model.graph.initializer if not uses_external_data(tensor)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(small)
    inputs = [value for value in model.graph.input if value.name not in tensors]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name, tensor in sorted(tensors.items()):  # the order in a safetensors file varies
        model.graph.initializer.append(numpy_helper.from_array(tensor, name))
    probabilities = next(value for value in model.graph.output if value.name == "probabilities")
    probabilities.type.tensor_type.shape.dim[1].dim_value = len(header.held)  # C, which the template leaves open
    return AssembledModel(header, bundle, model, frozen)


def serialized(model: onnx.ModelProto, frozen: Sequence[onnx.TensorProto], bundle: TaskBundle) -> Iterator[bytes]:
    """Parts of the serialized model, with one frozen weight in memory at a time.

    The weights are the last fields of the one graph, whose length is written first. Concatenated messages would be the
    same model to protobuf, but some readers, such as Netron's, only see the first or the last graph.
    """
    graph = model.graph.SerializeToString(deterministic=True)
    model.ClearField("graph")
    tensors = [_without_data(reference) for reference in frozen]
    starts = [_field(GRAPH_INITIALIZER, len(head) + size) + head for head, size in tensors]
    sizes = [len(start) + size for start, (_, size) in zip(starts, tensors, strict=True)]
    yield model.SerializeToString(deterministic=True)
    yield _field(MODEL_GRAPH, len(graph) + sum(sizes))
    yield graph
    for start, reference in zip(starts, frozen, strict=True):
        yield start
        tensor = onnx.TensorProto()
        tensor.CopyFrom(reference)
        load_external_data_for_tensor(tensor, str(bundle.root))
        yield tensor.raw_data


def _without_data(reference: onnx.TensorProto) -> tuple[bytes, int]:
    """A tensor with external data, serialized up to its data. Returns it and the bytes of the data."""
    length = next(int(entry.value) for entry in reference.external_data if entry.key == "length")
    tensor = onnx.TensorProto(name=reference.name, dims=reference.dims, data_type=reference.data_type)
    return tensor.SerializeToString(deterministic=True) + _field(TENSOR_RAW_DATA, length), length


def _field(number: int, length: int) -> bytes:
    """The start of a protobuf field of `length` bytes: its number and the length, both as varints."""
    return _varint(number << 3 | LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first. All bytes but the last have the highest bit set."""
    rest = value >> 7
    return bytes([value & 127 | 128]) + _varint(rest) if rest else bytes([value])
