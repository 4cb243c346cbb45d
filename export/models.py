"""The named models, and which weights the arguments of a build mean.

Nothing here imports torch, so that wrong arguments fail at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfmsl.errors import ConfigError, WeightsError

RANDOM = "random"


@dataclass(frozen=True)
class ModelSpec:
    """A named model. `hub`: repository of its weights. `family`: its model type. `config`: shape for `--weights
    random`. `size`: pixels per side, if the model is used with other sizes than it was trained with."""

    hub: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    size: int | None = None


SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
DINOV2_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}

MODELS = {
    "vit-s16": ModelSpec("WinKawaks/vit-small-patch16-224", "vit", SMALL),
    "vit-b16": ModelSpec("google/vit-base-patch16-224-in21k", "vit"),
    "vit-l16": ModelSpec("google/vit-large-patch16-224-in21k", "vit", LARGE),
    "deit-s16": ModelSpec("facebook/deit-small-distilled-patch16-224", "deit", SMALL),
    "dinov2-s14": ModelSpec("facebook/dinov2-small", "dinov2", DINOV2_SMALL, size=224),
    "dinov2-b14": ModelSpec("facebook/dinov2-base", "dinov2", {"image_size": 518}, size=224),
    "clip-vit-b16": ModelSpec("openai/clip-vit-base-patch16", "clip", {"patch_size": 16}),
    "minilm-l6": ModelSpec("sentence-transformers/all-MiniLM-L6-v2", "bert", MINILM),
}


def choose_weights(model: str, weights: str | None, revision: str | None) -> tuple[ModelSpec | None, str]:
    """The named model, None for a folder, and where its weights are: a hub repository, a folder or RANDOM.

    Raises ConfigError for an unknown model or a revision without a repository, WeightsError if there is no folder.
    """
    spec = MODELS.get(model)
    if spec is None and not (model and Path(model).is_dir()):
        raise ConfigError(f"--model {model!r} is neither a known model ({', '.join(MODELS)}) nor a transformers folder")
    source = (spec.hub if spec else model) if weights is None else weights
    if weights not in (None, RANDOM) and not (weights and Path(weights).is_dir()):
        raise WeightsError(f"--weights {source!r} is not a folder; pass a transformers folder or 'random'")
    if spec is None and weights not in (None, RANDOM):
        raise ConfigError(f"--model {model} is a folder, which has its own weights; omit --weights {weights}")
    if revision and (source == RANDOM or Path(source).is_dir()):
        raise ConfigError(f"--revision {revision} selects a commit on the hub, but the weights are {source}; remove it")
    return spec, source
