"""The personalized model, MoFM(global expert, own local expert, latest gate), as one self-contained ONNX file.

The bundle holds it as a template whose experts are inputs. Here they become constants, and the frozen weights, external
until now, are copied in. The only module of this room that needs the onnx package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from edge_runtime.store import DeviceStore
from edge_runtime.training.model import open_model_bundle, read_personal_model
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.bundle import Bundle


def write_model(store: DeviceStore, path: Path, bundle_path: Path | None = None) -> None:
    """The bundle is by default the one that the device has fetched.

    Raises InputError if this device has no personalized model yet, BundleError if there is no bundle, or another.
    """
    own = read_personal_model(store)
    header, tensors = own.header, own.inputs
    bundle = open_model_bundle(store, header, bundle_path)
    model = onnx.load(str(bundle.path(f"personal-{header.level}.onnx")), load_external_data=False)
    frozen = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    small = [tensor for tensor in model.graph.initializer if not uses_external_data(tensor)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(small)
    inputs = [value for value in model.graph.input if value.name not in tensors]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name, tensor in sorted(tensors.items()):  # safetensors gives them in any order
        model.graph.initializer.append(numpy_helper.from_array(tensor, name))
    metadata = {
        **{key: str(value) for key, value in header.model_dump().items()},
        "model": bundle.manifest.model,
        "classes": json.dumps(bundle.manifest.classes),
        "preprocessing": bundle.manifest.preprocessing.model_dump_json(),
        "tokenizer": bundle.tokenizer(),
    }
    onnx.helper.set_model_props(model, metadata)
    write_atomically(path, _serialized(model, frozen, bundle))


def _serialized(model: onnx.ModelProto, frozen: Sequence[onnx.TensorProto], bundle: Bundle) -> Iterator[bytes]:
    """The model with its frozen weights, of which only one is in memory at a time: where one serialized message follows
    another, protobuf reads both as one, their lists joined."""
    yield model.SerializeToString(deterministic=True)
    for reference in frozen:
        model = onnx.ModelProto()
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(reference)
        load_external_data_for_tensor(tensor, str(bundle.root))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
        yield model.SerializeToString(deterministic=True)
