"""Where a backbone's weights come from: the hub, a local transformers folder, or a seed."""

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

from export.families import FAMILIES, MODELS
from export.families.family import RGB, Family
from export.tokenizer import read_tokenizer
from fedfmsl.common.cli import console
from fedfmsl.errors import ConfigError, WeightsError
from fedfmsl.protocol.bundle import TOKENIZER, ImagePreprocessing, Preprocessing, TextPreprocessing

RANDOM = "random"
MAX_TOKENS = 128  # unless --max-tokens says otherwise
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Origin:
    """What transformers is told wherever it reads a file: a folder, or a hub repository, of which only what is `cached`
    is read where the hub does not answer. `revision` is what the user pinned, `commit` what it meant."""

    source: str
    revision: str | None = None
    cached: bool = False
    commit: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", "local_files_only": self.cached}

    @property
    def base(self) -> str:
        """The hub's name, or the folder's; its path would differ from machine to machine."""
        folder = Path(self.source)
        return folder.resolve().name if folder.is_dir() else self.source

    def error(self, error: Exception) -> WeightsError:
        """What to tell a user whom transformers told `error`."""
        said = str(error).splitlines()[0]
        if Path(self.source).is_dir():
            return WeightsError(f"{self.source} is not a usable transformers folder: {said}")
        if not self.cached:
            return WeightsError(f"cannot fetch {self.source} at revision {self.options['revision']}: {said}")
        return WeightsError(
            f"cannot fetch {self.source} from the Hugging Face hub; without a connection pass --weights FOLDER "
            "(a downloaded copy with config.json and model.safetensors), or --weights random for shapes and benchmarks"
        )


@dataclass(frozen=True)
class Backbone:
    """A transformers classification model with `classes` outputs, and where it came from (None: of a seed).

    `mean` and `std` are those its weights were trained with.
    """

    name: str
    family: Family
    model: Any
    size: int  # pixels per side, or tokens
    mean: RGB
    std: RGB
    tokenizer: str  # JSON, of a text model
    origin: Origin | None

    @property
    def backbone(self) -> Any:
        return getattr(self.model, self.family.backbone)

    @property
    def preprocessing(self) -> Preprocessing:
        """What becomes of a sample before the graphs see it."""
        if self.family.input == "tokens":
            return TextPreprocessing(max_tokens=self.size, pad_id=self.model.config.pad_token_id)
        return ImagePreprocessing(size=self.size, mean=self.mean, std=self.std)

    @property
    def parameters(self) -> int:
        """How many are frozen."""
        return sum(p.numel() for name, p in self.model.named_parameters() if not name.startswith("classifier."))


def load_backbone(
    model: str,
    weights: str | None,
    classes: int,
    size: int | None,
    revision: str | None,
    seed: int,
    tokenizer: Path | None = None,
) -> Backbone:
    """The model `model` (a name of MODELS or a transformers folder) with `weights` ("random", a folder, or None for
    the model's own), for images of `size` px, or texts of `size` tokens of `tokenizer` (None: the weights' own).

    Raises ConfigError for an unknown model, or one that needs a tokenizer; WeightsError if weights or tokenizer cannot
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
    if revision and (source == RANDOM or Path(source).is_dir()):
        raise ConfigError(f"--revision {revision} pins weights of the hub, but these are {source}")
    if spec and source == RANDOM:
        family, origin = spec.family, None
        config = family.reference.config_class(num_labels=classes, **spec.config)
    else:
        expected = (spec.family,) if spec else tuple(FAMILIES.values())
        family, config, origin = _look(model if source == RANDOM else source, revision, classes, expected)
    config._attn_implementation = "eager"
    mean, std = _normalisation(family, origin) if origin else (family.mean, family.std)
    if source == RANDOM:
        origin = None
    json = ""
    if family.input == "tokens":
        json = read_tokenizer(tokenizer or _tokenizer_of(origin), config.vocab_size)
    torch.manual_seed(seed)
    loaded = load_pretrained(family.reference, origin, config) if origin else family.reference(config)
    return Backbone(
        name=model if spec else Path(model).resolve().name,
        family=family,
        model=loaded.eval(),
        size=size or (spec.size if spec else _own_size(family, config)),
        mean=mean,
        std=std,
        tokenizer=json,
        origin=origin,
    )


def _own_size(family: Family, config: Any) -> int:
    """Pixels per side or tokens of a model without a name."""
    if family.input == "tokens":
        return min(MAX_TOKENS, int(config.max_position_embeddings))
    return int(config.image_size)


def _tokenizer_of(origin: Origin | None) -> Path:
    """The file beside the weights. Raises ConfigError or WeightsError if there is none."""
    if origin is None:
        raise ConfigError(f"random weights bring no tokenizer; add --tokenizer FILE, the {TOKENIZER} of such a model")
    try:
        return Path(cached_file(origin.source, TOKENIZER, **origin.options))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{origin.source} has no {TOKENIZER}; add --tokenizer FILE") from error


def load_pretrained(kind: type[Any], origin: Origin, config: Any) -> Any:
    """A model of class `kind` in fp32, of which only a classifier may be missing in the weights.

    Raises WeightsError if there are no safetensors, or not all that are needed in the shapes of `config`.
    """
    try:
        loaded, info = kind.from_pretrained(
            origin.source,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            # it looks for an adapter beside the weights, and at "main" if not told
            adapter_kwargs={"revision": origin.options["revision"]},
            **origin.options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise origin.error(error) from error
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    missing = [key for key in absent if not key.startswith("classifier.")]
    if missing:
        raise WeightsError(
            f"{origin.source} lacks weights in the shapes of its config, first {missing[0]!r}; is the copy complete?"
        )
    return loaded


def _look(source: str, revision: str | None, classes: int, expected: tuple[Family, ...]) -> tuple[Family, Any, Origin]:
    """The family and config of `source`, and the commit that `revision` means. Raises WeightsError if it is of none of
    the expected families."""
    origin = Origin(source, revision)
    if not Path(source).is_dir():
        origin = replace(origin, cached=not _hub_answers())
        console.print(
            f"{source}: from the cache, the hub does not answer" if origin.cached else f"{source}: from the hub"
        )
    try:
        described, _ = PretrainedConfig.get_config_dict(source, **origin.options)
        found = described.get("model_type")
        for family in expected:
            kind = family.reference.config_class
            if found in (family.model_type, kind.model_type):
                config = kind.from_pretrained(source, num_labels=classes, **origin.options)
                return family, config, replace(origin, commit=described.get("_commit_hash"))
    except (OSError, ValueError) as error:
        raise origin.error(error) from error
    wanted = ", ".join(family.model_type for family in expected)
    raise WeightsError(f"{source} holds a model of type {found!r}, expected {wanted}")


def _hub_answers() -> bool:
    """Asked once, because the hub's client tries an unreachable address for half a minute, and that for every file."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except OSError:  # requests' own errors are such, and so is the one for HF_HUB_OFFLINE
        return False
    return True


def _normalisation(family: Family, origin: Origin) -> tuple[RGB, RGB]:
    """Mean and standard deviation that the weights' own image processor subtracts and divides by, else the family's."""
    try:
        processor = get_image_processor_config(origin.source, **origin.options)
        if not processor.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return _rgb(processor.get("image_mean", family.mean)), _rgb(processor.get("image_std", family.std))
    except (OSError, ValueError, TypeError) as error:
        raise origin.error(error) from error


def _rgb(values: Any) -> RGB:
    red, green, blue = map(float, values)
    return red, green, blue
