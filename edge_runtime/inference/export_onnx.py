"""Writes the personalized model, MoFM of global expert, local expert and gate, as one self-contained ONNX file.

The bundle has a template with experts as inputs and weights as external data. This module turns the experts
into constants and copies the weights into the file. No other module of `edge_runtime` needs the onnx package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from edge_runtime.store import DeviceStore
from edge_runtime.training.model import mark_exported, open_model_bundle, read_personal_model
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.bundle import Bundle


def write_model(store: DeviceStore, path: Path, bundle_path: Path | None = None) -> None:
    """Writes the device's newest model to `path`. Default bundle: the one that the device downloaded.

    Raises InputError if the device has no personalized model yet, BundleError if its bundle is missing or another one.
    """
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
    metadata = {
        **{key: value if isinstance(value, str) else json.dumps(value) for key, value in header.model_dump().items()},
        "model": bundle.manifest.model,
        "classes": json.dumps(bundle.manifest.classes),
        "preprocessing": bundle.manifest.preprocessing.model_dump_json(),
        "tokenizer": bundle.tokenizer(),
    }
    onnx.helper.set_model_props(model, metadata)
    write_atomically(path, _serialized(model, frozen, bundle))
    if path == store.personalized:
        mark_exported(store, header)


def _serialized(model: onnx.ModelProto, frozen: Sequence[onnx.TensorProto], bundle: Bundle) -> Iterator[bytes]:
    """Parts of the serialized model, with one frozen weight in memory at a time.

    Protobuf reads concatenated messages as one message with concatenated lists.
    """
    yield model.SerializeToString(deterministic=True)
    for reference in frozen:
        model = onnx.ModelProto()
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(reference)
        load_external_data_for_tensor(tensor, str(bundle.root))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
        yield model.SerializeToString(deterministic=True)
