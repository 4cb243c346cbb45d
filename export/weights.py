"""Loads a backbone with weights from the Hugging Face hub, a transformers folder, or a random seed."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from transformers import PretrainedConfig
from transformers.utils import cached_file

from export.families import FAMILIES
from export.families.family import Family
from export.folder import check_config, check_folder, check_image_config, check_padding
from export.image_processor import read_processor
from export.models import RANDOM, ModelSpec, choose_weights
from export.tokenizer import read_tokenizer
from fedfmsl.common.cli import console
from fedfmsl.errors import ConfigError, WeightsError
from fedfmsl.protocol.bundle import TOKENIZER, ImagePreprocessing, Preprocessing, TextPreprocessing

MAX_TOKENS = 128  # default of --max-tokens
SNAPSHOT = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$")  # a folder of the hub's cache
HUB_SECONDS = 5.0  # timeout of the check whether the hub answers


@dataclass(frozen=True)
class Origin:
    """Source of weights: a folder or a hub repository.

    `cached`: read the local cache only, because the hub does not answer. `revision`: from the user. `commit`: the
    commit that `revision` names. `hub`: the repository that a folder is a copy of.
    """

    source: str
    revision: str | None = None
    cached: bool = False
    commit: str | None = None
    hub: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for transformers."""
        return {"revision": self.revision or "main", "local_files_only": self.cached}

    @property
    def base(self) -> str:
        """Name of the hub repository, or of the folder. The folder's path would differ between machines."""
        if self.hub:
            return self.hub
        folder = Path(self.source)
        return folder.resolve().name if folder.is_dir() else self.source

    def to_weights_error(self, error: Exception) -> WeightsError:
        """The error for the user from an error of transformers."""
        reason = (str(error).splitlines() or [""])[0]
        if not isinstance(error, OSError | ValueError | SafetensorError):  # their texts are for programmers: 'banana'
            reason = f"{type(error).__name__}: {reason}"
        if Path(self.source).is_dir():
            return WeightsError(f"{self.source} is not a usable transformers folder: {reason}")
        if not self.cached:
            return WeightsError(f"cannot fetch {self.source} at revision {self.options['revision']}: {reason}")
        return WeightsError(
            f"cannot fetch {self.source} from the Hugging Face hub; without a connection pass --weights FOLDER "
            "(a downloaded copy with config.json and model.safetensors), or --weights random for benchmarks"
        )


@dataclass(frozen=True)
class Found:
    """What is known of a model before its weights are read or fetched. `place`: as the user gave it. `config`: of
    transformers. `preprocessing`: of samples, before the graphs. `origin` is None for random weights."""

    place: str
    name: str
    family: Family
    config: Any
    preprocessing: Preprocessing
    tokenizer: str  # JSON of a text model's tokenizer, else ""
    origin: Origin | None

    @property
    def size(self) -> int:
        """Pixels per side, or tokens."""
        preprocessing = self.preprocessing
        return preprocessing.max_tokens if isinstance(preprocessing, TextPreprocessing) else preprocessing.size


@dataclass(frozen=True)
class Backbone(Found):
    """A transformers classification model."""

    model: Any

    @property
    def backbone(self) -> Any:
        """The part of the model without the head."""
        return getattr(self.model, self.family.backbone)

    @property
    def parameters(self) -> int:
        """Number of frozen parameters."""
        return sum(p.numel() for name, p in self.model.named_parameters() if not name.startswith("classifier."))


def load_backbone(
    model: str,
    weights: str | None,
    classes: int,
    size: int | None = None,
    revision: str | None = None,
    seed: int = 0,
    tokenizer: Path | None = None,
) -> Backbone:
    """Loads a model with `classes` outputs. Arguments and errors as for `find_backbone` and `load_weights`."""
    return load_weights(find_backbone(model, weights, classes, size, revision, tokenizer), seed)


def load_weights(found: Found, seed: int = 0) -> Backbone:
    """The model with its weights, or with random ones of this seed. Raises WeightsError if they are missing or damaged,
    or if transformers cannot make a model of this config."""
    torch.manual_seed(seed)
    kind, config, origin = found.family.reference, found.config, found.origin
    loaded = load_pretrained(kind, origin, config) if origin else _random(found)
    return Backbone(**vars(found), model=loaded.eval())


def find_backbone(
    model: str,
    weights: str | None,
    classes: int,
    size: int | None = None,
    revision: str | None = None,
    tokenizer: Path | None = None,
) -> Found:
    """Finds a model with `classes` outputs. Fetches no weights, only small files.

    `model`: a name of MODELS, or a transformers folder. `weights`: "random", a folder, or None for the model's own.
    `size`: pixels per side, or tokens. `tokenizer`: a tokenizer.json; None for the one beside the weights.

    Raises ConfigError for an unknown model, or if a tokenizer is required. Raises WeightsError if config or tokenizer
    are missing, damaged or of another family.
    """
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    spec, source = choose_weights(model, weights, revision)
    if spec and source == RANDOM:
        family, origin = FAMILIES[spec.family], None
        config = family.reference.config_class(num_labels=classes, **spec.config)
    else:
        expected = (FAMILIES[spec.family],) if spec else tuple(FAMILIES.values())
        family, config, origin = _find_weights(model if source == RANDOM else source, revision, classes, expected)
    config._attn_implementation = "eager"
    preprocessing = _preprocessing(family, config, origin, size, spec)
    if source == RANDOM:
        origin = None
    elif origin and spec and _has_shape(config, family, spec):
        origin = replace(origin, hub=spec.hub)
    tokenizer_json = ""
    if family.input == "tokens":
        tokenizer_json = read_tokenizer(tokenizer or _tokenizer_of(origin), config.vocab_size)
    return Found(
        place=model,
        name=model if spec else Path(model).resolve().name,
        family=family,
        config=config,
        preprocessing=preprocessing,
        tokenizer=tokenizer_json,
        origin=origin,
    )


def _random(found: Found) -> Any:
    """A model with random weights. Raises WeightsError if transformers cannot make one of this config."""
    try:
        return found.family.reference(found.config)
    except Exception as error:  # of any kind, as in `load_pretrained`
        raise Origin(found.place).to_weights_error(error) from error


def _preprocessing(
    family: Family, config: Any, origin: Origin | None, size: int | None, spec: ModelSpec | None
) -> Preprocessing:
    """From the image processor beside the weights, or the family's if there is none. `size` is the user's.

    Raises WeightsError if a device cannot do what the processor does, or if the model cannot take its images.
    """
    if family.input == "tokens":
        longest = min(MAX_TOKENS, config.max_position_embeddings)
        return TextPreprocessing(max_tokens=size or longest, pad_id=config.pad_token_id)
    try:
        processor = read_processor(origin.source, origin.options, family.model_type) if origin else None
    except (OSError, ValueError) as error:
        assert origin
        raise origin.to_weights_error(error) from error
    if processor is None:
        size = size or (spec.size if spec else None) or config.image_size
        return ImagePreprocessing(size=size, mean=family.mean, std=family.std)
    if size is None and processor.sized:
        if not family.any_size and processor.size != config.image_size:
            raise WeightsError(
                f"{processor.place} makes images of {processor.size} px, but the model takes {config.image_size} px; "
                f"correct it, or pass --image-size {config.image_size}"
            )
        size = processor.size
    return processor.preprocessing(size or config.image_size)


def _has_shape(config: Any, family: Family, spec: ModelSpec) -> bool:
    """Whether a folder can be a copy of the named model."""
    expected = family.reference.config_class(**spec.config)
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "vocab_size")
    return all(getattr(config, key, None) == getattr(expected, key, None) for key in keys)


def _tokenizer_of(origin: Origin | None) -> Path:
    """The tokenizer.json beside the weights. Raises ConfigError or WeightsError if there is none."""
    if origin is None:
        raise ConfigError(f"random weights have no tokenizer; pass --tokenizer FILE, the {TOKENIZER} of such a model")
    try:
        return Path(cached_file(origin.source, TOKENIZER, **origin.options))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{origin.source} has no {TOKENIZER}; pass --tokenizer FILE") from error


def load_pretrained(kind: type[Any], origin: Origin, config: Any) -> Any:
    """A model of class `kind` in fp32. The weights may lack the classifier, but nothing else.

    Raises WeightsError if there is no safetensors file, or if tensors are missing, not finite or have shapes other than
    `config`'s.
    """
    try:
        loaded, info = kind.from_pretrained(
            origin.source,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            # transformers looks for an adapter beside the weights, by default at revision "main"
            adapter_kwargs={"revision": origin.options["revision"]},
            **origin.options,
        )
    except Exception as error:  # transformers checks few values of a config: any kind of error follows from a bad one
        raise origin.to_weights_error(error) from error
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    missing = [key for key in absent if not key.startswith("classifier.")]
    if missing:
        raise WeightsError(
            f"{origin.source} has no tensor {missing[0]!r} in the shape of its config; it is incomplete, or not the "
            f"whole {config.model_type} model"
        )
    for name, tensor in loaded.named_parameters():
        if not (name.startswith("classifier.") or tensor.isfinite().all()):
            raise WeightsError(
                f"{origin.source}: the tensor {name!r} has values that are not finite; download it again"
            )
    return loaded


def _find_weights(
    source: str, revision: str | None, classes: int, expected: tuple[Family, ...]
) -> tuple[Family, Any, Origin]:
    """Family, config and origin of the weights in `source`.

    Raises WeightsError if they cannot be read or belong to no expected family.
    """
    origin = Origin(source, revision)
    if Path(source).is_dir():
        check_folder(Path(source))
        if snapshot := SNAPSHOT.search(str(Path(source).resolve())):
            origin = replace(origin, hub=f"{snapshot[1]}/{snapshot[2]}", commit=snapshot[3])
    else:
        origin = replace(origin, cached=not _is_hub_reachable())
        place = "the cache, because the hub does not answer" if origin.cached else "the hub"
        console.print(f"{source}: from {place}")
    try:
        settings, _ = PretrainedConfig.get_config_dict(source, **origin.options)
        model_type = settings.get("model_type")
        for family in expected:
            kind = family.reference.config_class
            if model_type in (family.model_type, kind.model_type):
                config = kind.from_pretrained(source, num_labels=classes, **origin.options)
                if family.input == "pixels":
                    check_image_config(config, source)
                check_config(config, source)
                if family.input == "tokens":
                    check_padding(config, source)
                return family, config, replace(origin, commit=origin.commit or settings.get("_commit_hash"))
    except WeightsError:
        raise
    except Exception as error:  # of any kind: config.json is a list, or has values of other types
        raise origin.to_weights_error(error) from error
    supported = ", ".join(family.model_type for family in expected)
    raise WeightsError(
        f"{source} has a model of type {model_type!r}, expected {supported}; choose another model or folder"
    )


def _is_hub_reachable() -> bool:
    """One request, because the hub's client retries an unreachable address for half a minute for every file."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except OSError:  # includes the errors of requests and of HF_HUB_OFFLINE
        return False
    return True
