"""Rebuilds a transformers folder from an ONNX export that still carries its backbone's weights.

Some packages ship a model only as ONNX. Its named initializers are the transformers keys; MatMul weights lost their
names and are found by the path of their node, and the two halves of the position embedding by the nodes they feed.

    python -m export.rebuild MODEL.onnx FOLDER
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import torch
import typer
from onnx import numpy_helper
from transformers import Dinov2Config, Dinov2Model

from fedfmsl.common.cli import application
from fedfmsl.errors import WeightsError

PREFIX = "backbone."
_MATMUL = re.compile(r"/backbone/(encoder/.*)/MatMul$")

app = application("Rebuild a DINOv2 transformers folder from an ONNX file that carries its weights.")


def dinov2_state(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The transformers state of a DINOv2 backbone inside `model`. Raises WeightsError if it holds none."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = {name[len(PREFIX) :]: array for name, array in tensors.items() if name.startswith(PREFIX)}
    for node in model.graph.node:
        match = _MATMUL.fullmatch(node.name)
        anonymous = [name for name in node.input if name in tensors]
        if node.op_type == "MatMul" and match and anonymous:
            state[match[1].replace("/", ".") + ".weight"] = tensors[anonymous[0]].T
    halves = [array for name, array in tensors.items() if name.startswith("onnx::") and array.ndim == 3]
    if "embeddings.cls_token" not in state or len(halves) != 2:
        raise WeightsError("the ONNX file holds no DINOv2 backbone under the names 'backbone.*'")
    state["embeddings.position_embeddings"] = np.concatenate(sorted(halves, key=lambda a: a.shape[1]), axis=1)
    return state


@app.command()
def rebuild(
    source: Path = typer.Argument(help="The ONNX file."),
    folder: Path = typer.Argument(help="The transformers folder to write."),
) -> None:
    try:
        state = dinov2_state(onnx.load(str(source)))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source} is not a readable ONNX file: {error}") from error
    hidden = state["norm.weight" if "norm.weight" in state else "layernorm.weight"].size
    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    positions = state["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=len([key for key in state if key.endswith("norm1.weight")]),
        num_attention_heads=hidden // 64,
        patch_size=patch,
        image_size=round(positions**0.5) * patch,
        use_mask_token=False,
    )
    model = Dinov2Model(config)
    model.load_state_dict({key: torch.from_numpy(array.copy()) for key, array in state.items()})
    model.save_pretrained(folder)
    print(f"{folder}: DINOv2, hidden size {hidden}, {config.num_hidden_layers} blocks, patch {patch}")


if __name__ == "__main__":
    app()
