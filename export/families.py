"""The families of backbones: how each names and shapes what `export.transformer` needs.

A new family is one object of `Family` here and its rows in MODELS; one that is wrong cannot pass the build's own
comparison with transformers and PEFT (`export.parity`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from export.graph import Array
from export.transformer import Geometry
from protocol.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, identified by its config's `model_type`."""

    model_type: str
    backbone: str  # attribute of the classification model that holds the backbone
    block_keys: dict[str, str]  # canonical name → the block's own key
    norm: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classifier_width: int  # in multiples of the hidden size
    position: Callable[[Any, int], torch.Tensor]  # (backbone, image size) → (1, N, D)

    def projection(self, block: int, target: str) -> str:
        """Name, within the backbone, of a block's projection that carries LoRA."""
        return f"encoder.layer.{block}.{self.block_keys[target]}"

    def geometry(self, config: Any, image_size: int) -> Geometry:
        """Raises ConfigError for an image size or a variant that this family's graphs do not cover."""
        if image_size % config.patch_size:
            raise ConfigError(f"--image-size {image_size} is not a multiple of the patch size {config.patch_size}")
        if config.hidden_act != "gelu" or getattr(config, "use_swiglu_ffn", False):
            raise ConfigError(f"{config.model_type} with activation {config.hidden_act!r} or SwiGLU is not supported")
        return Geometry(
            tokens=(image_size // config.patch_size) ** 2 + 1,
            hidden=config.hidden_size,
            blocks=config.num_hidden_layers,
            heads=config.num_attention_heads,
            patch=config.patch_size,
            epsilon=config.layer_norm_eps,
        )

    def weights(self, backbone: Any, image_size: int) -> dict[str, Array]:
        """The backbone's weights under `export.transformer`'s canonical names, projections as (in, out)."""
        state = {key: tensor.detach().float().numpy() for key, tensor in backbone.state_dict().items()}
        position = self.position(backbone, image_size).detach().float().numpy().copy()
        position[:, 0] += state["embeddings.cls_token"][0]
        weights: dict[str, Array] = {
            "patch.weight": state["embeddings.patch_embeddings.projection.weight"],
            "patch.bias": state["embeddings.patch_embeddings.projection.bias"],
            "position": position,
            "norm.weight": state[f"{self.norm}.weight"],
            "norm.bias": state[f"{self.norm}.bias"],
        }
        for block in range(backbone.config.num_hidden_layers):
            for name, key in self.block_keys.items():
                source = f"encoder.layer.{block}.{key}"
                if name.startswith("scale"):
                    weights[f"blocks.{block}.{name}"] = state[source]
                    continue
                weight = state[f"{source}.weight"]
                weights[f"blocks.{block}.{name}.weight"] = np.ascontiguousarray(weight.T)
                bias = state.get(f"{source}.bias")
                weights[f"blocks.{block}.{name}.bias"] = np.zeros(weight.shape[0], np.float32) if bias is None else bias
        return weights


def _vit_position(backbone: Any, image_size: int) -> torch.Tensor:
    native = backbone.config.image_size
    if image_size != native:
        raise ConfigError(f"this ViT takes images of {native} px only, not --image-size {image_size}")
    position: torch.Tensor = backbone.embeddings.position_embeddings
    return position


def _dinov2_position(backbone: Any, image_size: int) -> torch.Tensor:
    embeddings = backbone.embeddings
    tokens = (image_size // backbone.config.patch_size) ** 2 + 1
    like = torch.empty(1, tokens, backbone.config.hidden_size)
    position: torch.Tensor = embeddings.interpolate_pos_encoding(like, image_size, image_size)
    return position


VIT = Family(
    model_type="vit",
    backbone="vit",
    block_keys={
        "norm1": "layernorm_before",
        "query": "attention.attention.query",
        "key": "attention.attention.key",
        "value": "attention.attention.value",
        "output": "attention.output.dense",
        "norm2": "layernorm_after",
        "up": "intermediate.dense",
        "down": "output.dense",
    },
    norm="layernorm",
    mean=HALF,
    std=HALF,
    classifier_width=1,
    position=_vit_position,
)

DINOV2 = Family(
    model_type="dinov2",
    backbone="dinov2",
    block_keys={
        "norm1": "norm1",
        "query": "attention.attention.query",
        "key": "attention.attention.key",
        "value": "attention.attention.value",
        "output": "attention.output.dense",
        "scale1": "layer_scale1.lambda1",
        "norm2": "norm2",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "scale2": "layer_scale2.lambda1",
    },
    norm="layernorm",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    classifier_width=2,  # transformers' classifier also reads the mean patch token
    position=_dinov2_position,
)

FAMILIES = {family.model_type: family for family in (VIT, DINOV2)}


@dataclass(frozen=True)
class ModelSpec:
    """A named model: where its weights are published, and its shape for `--weights random`."""

    hub: str
    family: Family
    image_size: int
    config: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "vit-b16": ModelSpec("google/vit-base-patch16-224-in21k", VIT, 224),
    "dinov2-s14": ModelSpec(
        "facebook/dinov2-small",
        DINOV2,
        224,
        {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518},
    ),
    "dinov2-b14": ModelSpec("facebook/dinov2-base", DINOV2, 224, {"image_size": 518}),
}
