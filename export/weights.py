"""Where a backbone's weights come from: the hub, a local transformers folder, or a seed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PretrainedConfig

from export.families import FAMILIES, MODELS
from export.families.family import Family
from export.tokenizer import read_tokenizer
from protocol.errors import ConfigError, WeightsError
from shell.cli import console

RANDOM = "random"
MAX_TOKENS = 128  # unless --max-tokens says otherwise


@dataclass(frozen=True)
class Backbone:
    """A transformers classification model with `classes` outputs, and where it came from."""

    name: str
    family: Family
    model: Any
    size: int  # pixels per side, or tokens
    tokenizer: str  # JSON, of a text model
    base: str  # what `from_pretrained` takes to load it again
    revision: str | None

    @property
    def backbone(self) -> Any:
        return getattr(self.model, self.family.backbone)

    @property
    def parameters(self) -> int:
        """How many are frozen."""
        return sum(p.numel() for name, p in self.model.named_parameters() if not name.startswith("classifier."))


def load_backbone(
    model: str,
    weights: str | None,
    classes: int,
    image_size: int | None = None,
    revision: str | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    tokenizer: Path | None = None,
) -> Backbone:
    """The model `model` (a name of MODELS or a transformers folder) with `weights` ("random", a folder, or None for
    the model's own), for images of `image_size` px or texts of `max_tokens` from `tokenizer`.

    Raises ConfigError for an unknown model or an option it does not take, WeightsError if weights or tokenizer cannot
    be had or are of another family.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    spec = MODELS.get(model)
    if spec is None and not Path(model).is_dir():
        raise ConfigError(f"--model {model!r} is neither a known model ({', '.join(MODELS)}) nor a transformers folder")
    source = weights or (spec.hub if spec else model)
    if weights not in (None, RANDOM) and not Path(source).is_dir():
        raise WeightsError(f"--weights {source!r} is not a folder; give a transformers folder or 'random'")
    if source != RANDOM and not Path(source).is_dir():
        console.print(f"fetching {source} from the hub, or its cache")
    if spec and source == RANDOM:
        family = spec.family
        config = family.reference.config_class(num_labels=classes, **spec.config)
    else:
        where = model if source == RANDOM else source
        family = _family(where, revision, (spec.family,) if spec else tuple(FAMILIES.values()))
        config = family.reference.config_class.from_pretrained(where, num_labels=classes, revision=revision)
    json = ""
    if family.input == "pixels":
        if max_tokens or tokenizer:
            raise ConfigError(f"--max-tokens and --tokenizer do not go with {model}, which reads images")
        size = image_size or (spec.size if spec else config.image_size)
    else:
        if image_size:
            raise ConfigError(f"--image-size does not go with {model}, which reads texts; see --max-tokens")
        size = max_tokens or (spec.size if spec else min(MAX_TOKENS, config.max_position_embeddings))
        beside = source if source != RANDOM else None if spec else model
        json = read_tokenizer(tokenizer, beside, revision, config.vocab_size)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    loaded = family.reference(config) if source == RANDOM else _load(family, source, config, revision)
    return Backbone(
        name=model if spec else Path(model).resolve().name,
        family=family,
        model=loaded.eval(),
        size=size,
        tokenizer=json,
        base=str(Path(source).resolve()) if Path(source).is_dir() else source,
        revision=revision,
    )


def _family(source: str, revision: str | None, expected: tuple[Family, ...]) -> Family:
    """Which of the expected families `source` is of. Raises WeightsError if none."""
    try:
        found = PretrainedConfig.get_config_dict(source, revision=revision)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise _unreachable(source, error) from error
    for family in expected:
        if family.model_type == found:
            return family
    wanted = ", ".join(family.model_type for family in expected)
    raise WeightsError(f"{source} holds a model of type {found!r}, expected {wanted}")


def _load(family: Family, source: str, config: Any, revision: str | None) -> Any:
    try:
        loaded, info = family.reference.from_pretrained(
            source,
            config=config,
            revision=revision,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreachable(source, error) from error
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    missing = [key for key in absent if not key.startswith("classifier.")]
    if missing:
        raise WeightsError(
            f"{source} lacks weights of the backbone in the shapes of its config, first {missing[0]!r}; "
            "is the copy complete?"
        )
    return loaded


def _unreachable(source: str, error: Exception) -> WeightsError:
    if Path(source).is_dir():
        return WeightsError(f"{source} is not a usable transformers folder: {str(error).splitlines()[0]}")
    return WeightsError(
        f"cannot fetch {source} from the Hugging Face hub; without a connection pass --weights FOLDER "
        "(a downloaded copy with config.json and model.safetensors), or --weights random for shapes and benchmarks"
    )
