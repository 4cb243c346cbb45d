"""Rebuilds a transformers folder from an ONNX file that contains the weights of a DINOv2 backbone.

Some packages ship a model only as ONNX. Named initializers have transformers keys. MatMul weights have no names; the
path of their node names them. The position embedding is in two parts, for the class token and for the patches.

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
from safetensors.torch import save
from transformers import Dinov2Config, Dinov2Model

from fedfmsl.common.cli import application
from fedfmsl.errors import WeightsError

PREFIX = "backbone."
_MATMUL = re.compile(r"/backbone/(encoder/.*)/MatMul$")

app = application()


def dinov2_state(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The transformers state of the DINOv2 backbone in `model`. Raises WeightsError if there is none."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    state = {name[len(PREFIX) :]: array for name, array in tensors.items() if name.startswith(PREFIX)}
    for node in model.graph.node:
        match = _MATMUL.fullmatch(node.name)
        unnamed = [name for name in node.input if name in tensors]
        if node.op_type == "MatMul" and match and unnamed:
            state[match[1].replace("/", ".") + ".weight"] = tensors[unnamed[0]].T
    parts = [array for name, array in tensors.items() if name.startswith("onnx::") and array.ndim == 3]
    if "embeddings.cls_token" not in state or len(parts) != 2:
        raise WeightsError("the ONNX file has no DINOv2 backbone with tensors named 'backbone.*'")
    state["embeddings.position_embeddings"] = np.concatenate(sorted(parts, key=lambda a: a.shape[1]), axis=1)
    return state


@app.command()
def rebuild(
    source: Path = typer.Argument(help="The ONNX file."),
    folder: Path = typer.Argument(help="The transformers folder to write."),
) -> None:
    """Rebuild a DINOv2 transformers folder from an ONNX file that contains its weights."""
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
    config.architectures = ["Dinov2Model"]
    model = Dinov2Model(config)
    model.load_state_dict({key: torch.from_numpy(array.copy()) for key, array in state.items()})
    config.save_pretrained(folder)
    # not save_pretrained of the model, which lets nobody but the owner read the weights
    (folder / "model.safetensors").write_bytes(save(model.state_dict(), {"format": "pt"}))
    print(f"{folder}: DINOv2, hidden size {hidden}, {config.num_hidden_layers} blocks, patch {patch}")


if __name__ == "__main__":
    app()
