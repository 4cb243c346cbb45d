"""The registry: every family of backbones, and the models known by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from export.families.bert import BERT
from export.families.dinov2 import DINOV2
from export.families.family import Family
from export.families.vit import VIT

FAMILIES = {family.model_type: family for family in (VIT, DINOV2, BERT)}


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
    "minilm-l6": ModelSpec(
        "sentence-transformers/all-MiniLM-L6-v2",
        BERT,
        128,
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
}
