"""Writes the artifacts that onnxruntime-training (1.19.2) trains a level with. It adds the gradient itself.

    ort-training-{k}.onnx         the loss of step-{k}.onnx, its gradient, gradient accumulation
    ort-training-{k}.checkpoint   a nominal checkpoint: names of the trainables in the layout's order, no values
    ort-training-optimizer.onnx   AdamW as in torch, without weight decay, for every level

Frozen weights stay in the weight file of the bundle. The number of classes C is symbolic; a session sets it.
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

# torch.optim.AdamW differs in eps and in where it is added. The device applies weight decay, which LoRA alone has.
TORCH_ADAMW = {"adam_mode": 0, "epsilon": 1e-8, "weight_decay": 0.0}


def write_artifacts(writer: GraphWriter, level: int) -> str:
    """Writes training graph, checkpoint and optimizer. Returns the file name of the training graph."""
    model = writer.forward(level).model()
    trainables = writer.experts.names(level)
    externals = _externals_to_inputs(model)
    with tempfile.TemporaryDirectory() as folder:
        _generate(model, trainables, Path(folder))
        training = onnx.load(str(Path(folder) / "training_model.onnx"))
        optimizer = onnx.load(str(Path(folder) / "optimizer_model.onnx"))
        checkpoint = (Path(folder) / "nominal_checkpoint").read_bytes()
    _inputs_to_externals(training, externals)
    _make_classes_symbolic(training)
    if [value.name for value in training.graph.input if value.name in set(trainables)] != trainables:
        raise BundleError(
            f"onnxruntime-training changed the order of the trainables of level {level}; install version 1.19.2, "
            "or build without --ort-training"
        )
    _use_torch_adamw(optimizer)
    name = f"ort-training-{level}.onnx"
    (writer.root / name).write_bytes(training.SerializeToString(deterministic=True))
    (writer.root / f"ort-training-{level}.checkpoint").write_bytes(checkpoint)
    (writer.root / "ort-training-optimizer.onnx").write_bytes(optimizer.SerializeToString(deterministic=True))
    return name


def _externals_to_inputs(model: onnx.ModelProto) -> list[TensorProto]:
    """Replaces initializers with external data by inputs, because onnxruntime-training cannot read the weight file."""
    externals = [tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    for tensor in externals:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return externals


def _inputs_to_externals(model: onnx.ModelProto, externals: list[TensorProto]) -> None:
    """Turns these inputs into initializers again."""
    names = {tensor.name for tensor in externals}
    for value in [value for value in model.graph.input if value.name in names]:
        model.graph.input.remove(value)
    model.graph.initializer.extend(externals)


def _make_classes_symbolic(training: onnx.ModelProto) -> None:
    """Replaces the number of classes that the parameters of the head were declared with."""
    for value in [*training.graph.input, *training.graph.output]:
        if value.name.startswith("classifier."):  # parameters and sums of gradients
            value.type.tensor_type.shape.dim[0].dim_param = "C"
    del training.graph.value_info[:]  # shapes of intermediate tensors, which ONNX Runtime infers again


def _use_torch_adamw(optimizer: onnx.ModelProto) -> None:
    """Patches the optimizer's only node, and its names, which depend on the number of optimizers in this process."""
    (node,) = optimizer.graph.node
    for attribute in [attribute for attribute in node.attribute if attribute.name in TORCH_ADAMW]:
        node.attribute.remove(attribute)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in TORCH_ADAMW.items())
    node.name = "adamw"
    node.output[0] = optimizer.graph.output[0].name = "updated"
    optimizer.ir_version = IR_VERSION  # the generator writes the onnx package's version, which may be too new to read


def _generate(model: onnx.ModelProto, trainables: list[str], folder: Path) -> None:
    from onnxruntime.training import artifacts

    with _silent_in(folder):
        artifacts.generate_artifacts(
            model,
            requires_grad=trainables,
            optimizer=artifacts.OptimType.AdamW,
            artifact_directory=folder,
            nominal_checkpoint=True,
        )


@contextmanager
def _silent_in(folder: Path) -> Iterator[None]:
    """Hides standard error and changes the working directory to `folder`.

    generate_artifacts logs to standard error at any log level, and deletes a `temp.onnx` in the working directory.
    """
    previous, error = Path.cwd(), os.dup(2)
    sys.stderr.flush()
    try:
        with Path(os.devnull).open("wb") as null:
            os.dup2(null.fileno(), 2)
        os.chdir(folder)
        yield
    finally:
        os.chdir(previous)
        os.dup2(error, 2)
        os.close(error)
