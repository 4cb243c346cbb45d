"""DeiT (Touvron et al. 2021): a ViT with a distillation token after the class token.

The classifier reads only the class token, as in `DeiTForImageClassification`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import DeiTForImageClassification

from export.families.family import IMAGENET_MEAN, IMAGENET_STD, Family, array, native_geometry
from export.families.vit import BLOCK_KEYS, outer_weights
from export.graph import Array
from export.transformer import Geometry


def _geometry(config: Any, size: int) -> Geometry:
    vit = native_geometry(config, size)
    return replace(vit, tokens=vit.tokens + 1, special=2)


def _outer(model: Any, size: int) -> dict[str, Array]:
    embeddings = model.deit.embeddings
    position = array(embeddings.position_embeddings).copy()
    position[:, 1] += array(embeddings.distillation_token)[0]
    return outer_weights(model.deit, position)


DEIT = Family(
    model_type="deit",
    reference=DeiTForImageClassification,
    backbone="deit",
    layers="encoder.layer",
    block_keys=BLOCK_KEYS,
    geometry=_geometry,
    outer=_outer,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
