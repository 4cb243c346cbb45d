"""A level's training step as artifacts of onnxruntime-training (1.19.2), which writes the gradient itself.

    ort-training-{k}.onnx         the loss of step-{k}.onnx, its gradient, gradient accumulation
    ort-training-{k}.checkpoint   nominal: the trainables' names, in the layout's order, without values
    ort-training-optimizer.onnx   torch's AdamW without weight decay, for every level

Frozen weights stay in the bundle's one weight file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from export.graph import IR_VERSION
from export.graphs import GraphWriter
from fedfmsl.errors import BundleError

# What distinguishes torch.optim.AdamW: epsilon, and where it is added. Decay differs by parameter: the device's part.
TORCHS_ADAMW = {"adam_mode": 0, "epsilon": 1e-8, "weight_decay": 0.0}


def write_artifacts(writer: GraphWriter, level: int) -> str:
    """The name of the training graph that was written, checkpoint and optimizer beside it."""
    model = writer.forward(level).model()
    trainables = writer.experts.names(level)
    stored = _take_stored(model)
    with tempfile.TemporaryDirectory() as folder:
        _generate(model, trainables, Path(folder))
        training = onnx.load(str(Path(folder) / "training_model.onnx"))
        optimizer = onnx.load(str(Path(folder) / "optimizer_model.onnx"))
        checkpoint = (Path(folder) / "nominal_checkpoint").read_bytes()
    _put_stored(training, stored)
    if [value.name for value in training.graph.input if value.name in set(trainables)] != trainables:
        raise BundleError(f"onnxruntime-training has reordered the trainables of level {level}")
    _make_torchs(optimizer)
    name = f"ort-training-{level}.onnx"
    (writer.root / name).write_bytes(training.SerializeToString(deterministic=True))
    (writer.root / f"ort-training-{level}.checkpoint").write_bytes(checkpoint)
    (writer.root / "ort-training-optimizer.onnx").write_bytes(optimizer.SerializeToString(deterministic=True))
    return name


def _take_stored(model: onnx.ModelProto) -> list[TensorProto]:
    """Makes inputs of the initializers that lie in the weight file, where onnxruntime-training would look in vain."""
    stored = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    for tensor in stored:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return stored


def _put_stored(model: onnx.ModelProto, stored: list[TensorProto]) -> None:
    """Makes initializers of them again."""
    names = {tensor.name for tensor in stored}
    for value in [value for value in model.graph.input if value.name in names]:
        model.graph.input.remove(value)
    model.graph.initializer.extend(stored)


def _make_torchs(optimizer: onnx.ModelProto) -> None:
    """Patches the optimizer's one node, and names that count how many were made in this process."""
    (node,) = optimizer.graph.node
    for attribute in [attribute for attribute in node.attribute if attribute.name in TORCHS_ADAMW]:
        node.attribute.remove(attribute)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in TORCHS_ADAMW.items())
    node.name = "adamw"
    node.output[0] = optimizer.graph.output[0].name = "updated"
    optimizer.ir_version = IR_VERSION  # it is stamped with that of the onnx package, which may be too new for it


def _generate(model: onnx.ModelProto, trainables: list[str], folder: Path) -> None:
    from onnxruntime.training import artifacts

    with _confined(folder):
        artifacts.generate_artifacts(
            model,
            requires_grad=trainables,
            optimizer=artifacts.OptimType.AdamW,
            artifact_directory=folder,
            nominal_checkpoint=True,
        )


@contextmanager
def _confined(folder: Path) -> Iterator[None]:
    """generate_artifacts logs every pass to standard error, whatever the level, and deletes a `temp.onnx` wherever it
    is called: neither is to be seen by our user."""
    here, error = Path.cwd(), os.dup(2)
    sys.stderr.flush()
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        os.chdir(folder)
        yield
    finally:
        os.chdir(here)
        os.dup2(error, 2)
        os.close(error)
