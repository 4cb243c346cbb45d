"""All families of backbones, and the named models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from export.families.bert import BERT
from export.families.clip import CLIP
from export.families.deit import DEIT
from export.families.dinov2 import DINOV2
from export.families.family import Family
from export.families.vit import VIT

FAMILIES = {family.model_type: family for family in (VIT, DEIT, DINOV2, CLIP, BERT)}


@dataclass(frozen=True)
class ModelSpec:
    """A named model. `hub`: repository of its weights. `size`: input size. `config`: shape for `--weights random`."""

    hub: str
    family: Family
    size: int
    config: dict[str, Any] = field(default_factory=dict)


SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

MODELS = {
    "vit-s16": ModelSpec("WinKawaks/vit-small-patch16-224", VIT, 224, SMALL),
    "vit-b16": ModelSpec("google/vit-base-patch16-224-in21k", VIT, 224),
    "vit-l16": ModelSpec("google/vit-large-patch16-224-in21k", VIT, 224, LARGE),
    "deit-s16": ModelSpec("facebook/deit-small-distilled-patch16-224", DEIT, 224, SMALL),
    "dinov2-s14": ModelSpec(
        "facebook/dinov2-small", DINOV2, 224, {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}
    ),
    "dinov2-b14": ModelSpec("facebook/dinov2-base", DINOV2, 224, {"image_size": 518}),
    "clip-vit-b16": ModelSpec("openai/clip-vit-base-patch16", CLIP, 224, {"patch_size": 16}),
    "minilm-l6": ModelSpec(
        "sentence-transformers/all-MiniLM-L6-v2",
        BERT,
        128,
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
}
