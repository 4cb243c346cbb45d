"""Loads a backbone with weights from the Hugging Face hub, a transformers folder, or a random seed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from transformers import PretrainedConfig
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.utils import cached_file

from export.families import FAMILIES
from export.families.family import RGB, Family
from export.folder import check_folder, check_image_config
from export.models import RANDOM, choose_weights
from export.tokenizer import read_tokenizer
from fedfmsl.common.cli import console
from fedfmsl.errors import ConfigError, WeightsError
from fedfmsl.protocol.bundle import TOKENIZER, ImagePreprocessing, Preprocessing, TextPreprocessing

MAX_TOKENS = 128  # default of --max-tokens
HUB_SECONDS = 5.0  # timeout of the check whether the hub answers


@dataclass(frozen=True)
class Origin:
    """Source of weights: a folder or a hub repository.

    `cached`: read the local cache only, because the hub does not answer. `revision`: from the user. `commit`: the
    commit that `revision` names.
    """

    source: str
    revision: str | None = None
    cached: bool = False
    commit: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for transformers."""
        return {"revision": self.revision or "main", "local_files_only": self.cached}

    @property
    def base(self) -> str:
        """Name of the hub repository, or of the folder. The folder's path would differ between machines."""
        folder = Path(self.source)
        return folder.resolve().name if folder.is_dir() else self.source

    def to_weights_error(self, error: Exception) -> WeightsError:
        """The error for the user from an error of transformers."""
        reason = str(error).splitlines()[0]
        if Path(self.source).is_dir():
            return WeightsError(f"{self.source} is not a usable transformers folder: {reason}")
        if not self.cached:
            return WeightsError(f"cannot fetch {self.source} at revision {self.options['revision']}: {reason}")
        return WeightsError(
            f"cannot fetch {self.source} from the Hugging Face hub; without a connection pass --weights FOLDER "
            "(a downloaded copy with config.json and model.safetensors), or --weights random for benchmarks"
        )


@dataclass(frozen=True)
class Backbone:
    """A transformers classification model. `origin` is None for random weights.

    `mean` and `std`: image normalization that the weights were trained with.
    """

    name: str
    family: Family
    model: Any
    size: int  # pixels per side, or tokens
    mean: RGB
    std: RGB
    tokenizer: str  # JSON of a text model's tokenizer, else ""
    origin: Origin | None

    @property
    def backbone(self) -> Any:
        """The part of the model without the head."""
        return getattr(self.model, self.family.backbone)

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of samples before the graphs."""
        if self.family.input == "tokens":
            return TextPreprocessing(max_tokens=self.size, pad_id=self.model.config.pad_token_id)
        return ImagePreprocessing(size=self.size, mean=self.mean, std=self.std)

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
    """Loads a model with `classes` outputs.

    `model`: a name of MODELS, or a transformers folder. `weights`: "random", a folder, or None for the model's own.
    `size`: pixels per side, or tokens. `tokenizer`: a tokenizer.json; None for the one beside the weights.

    Raises ConfigError for an unknown model, or if a tokenizer is required. Raises WeightsError if weights or tokenizer
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
    mean, std = _normalization(family, origin) if origin else (family.mean, family.std)
    if source == RANDOM:
        origin = None
    tokenizer_json = ""
    if family.input == "tokens":
        tokenizer_json = read_tokenizer(tokenizer or _tokenizer_of(origin), config.vocab_size)
    torch.manual_seed(seed)
    loaded = load_pretrained(family.reference, origin, config) if origin else family.reference(config)
    return Backbone(
        name=model if spec else Path(model).resolve().name,
        family=family,
        model=loaded.eval(),
        size=size or (spec.size if spec else None) or _default_size(family, config),
        mean=mean,
        std=std,
        tokenizer=tokenizer_json,
        origin=origin,
    )


def _default_size(family: Family, config: Any) -> int:
    """Pixels per side, or tokens, from the config."""
    if family.input == "tokens":
        return min(MAX_TOKENS, int(config.max_position_embeddings))
    return int(config.image_size)


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
    except (OSError, ValueError, SafetensorError) as error:
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
                return family, config, replace(origin, commit=settings.get("_commit_hash"))
    except (OSError, ValueError, TypeError) as error:  # TypeError: config.json is a list
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


def _normalization(family: Family, origin: Origin) -> tuple[RGB, RGB]:
    """Mean and standard deviation of the image processor beside the weights. Default: the family's."""
    try:
        processor = get_image_processor_config(origin.source, **origin.options)
        if not processor.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return _rgb(processor.get("image_mean", family.mean)), _rgb(processor.get("image_std", family.std))
    except (OSError, ValueError, TypeError) as error:
        raise origin.to_weights_error(error) from error


def _rgb(values: Any) -> RGB:
    red, green, blue = map(float, values)
    return red, green, blue
