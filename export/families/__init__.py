"""The registry: every family of backbones, and the models known by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from export.families.dinov2 import DINOV2
from export.families.family import Family
from export.families.vit import VIT

FAMILIES = {family.model_type: family for family in (VIT, DINOV2)}


@dataclass(frozen=True)
class ModelSpec:
    """A named model: where its weights are published, its input size, and its shape for `--weights random`."""

    hub: str
    family: Family
    size: int
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
