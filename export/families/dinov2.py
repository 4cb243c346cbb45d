"""DINOv2 (Oquab et al. 2023) without registers: a ViT with layer scale, for any image size."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Dinov2ForImageClassification

from export.families.family import IMAGENET_MEAN, IMAGENET_STD, Family, array, patches, vision_geometry
from export.families.vit import outer_weights
from export.graph import Array
from export.transformer import Geometry
from fedfmsl.errors import ConfigError


def _geometry(config: Any, size: int) -> Geometry:
    if config.use_swiglu_ffn:
        raise ConfigError("DINOv2 with SwiGLU (the giant model) is not supported; choose a smaller one")
    return vision_geometry(config, size)


def _outer(model: Any, size: int) -> dict[str, Array]:
    embeddings, config = model.dinov2.embeddings, model.config
    shape_only = torch.empty(1, patches(config, size) + 1, config.hidden_size)
    return outer_weights(model.dinov2, array(embeddings.interpolate_pos_encoding(shape_only, size, size)).copy())


DINOV2 = Family(
    model_type="dinov2",
    reference=Dinov2ForImageClassification,
    backbone="dinov2",
    layers="encoder.layer",
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
    geometry=_geometry,
    outer=_outer,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    any_size=True,
    classifier_width=2,  # transformers' classifier also reads the mean patch token
)
