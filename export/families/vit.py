"""ViT (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from typing import Any

from transformers import ViTForImageClassification

from export.families.family import Family, affine, array, native_geometry
from export.graph import Array

BLOCK_KEYS = {
    "norm1": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "output": "attention.output.dense",
    "norm2": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def outer_weights(backbone: Any, position: Array) -> dict[str, Array]:
    """Weights outside the blocks, for a backbone with ViT's names. Adds the class token to `position` (1, N, D)."""
    position[:, 0] += array(backbone.embeddings.cls_token)[0]
    return {
        **affine("patch", backbone.embeddings.patch_embeddings.projection),
        "position": position,
        **affine("norm", backbone.layernorm),
    }


def _outer(model: Any, size: int) -> dict[str, Array]:
    return outer_weights(model.vit, array(model.vit.embeddings.position_embeddings).copy())


VIT = Family(
    model_type="vit",
    reference=ViTForImageClassification,
    backbone="vit",
    layers="encoder.layer",
    block_keys=BLOCK_KEYS,
    geometry=native_geometry,
    outer=_outer,
)
