"""The zero-shot head: classifier weights from class names, computed by the model's text tower.

Radford et al. 2021, prompt ensembling.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from export.folder import check_config
from export.graph import WEIGHTS_FILE
from export.weights import Found, Origin, load_pretrained, load_weights
from fedfmsl.common.cli import console
from fedfmsl.errors import ConfigError, WeightsError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.task import ZeroShot

TEMPLATES = (  # ours, for photos of objects
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of several {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
)


def make_zero_shot(source: Found, classes: Sequence[str], prompts: list[str] | None) -> ZeroShot | None:
    """The zero-shot head. None if the model has no text tower.

    If the weights lack it, prints the reason, or raises WeightsError if the user passed prompts.
    """
    if source.family.text_tower is None and not prompts:
        return None
    try:
        return zero_shot_head(source, classes, prompts or TEMPLATES)
    except WeightsError as error:
        if prompts:
            raise
        console.print(f"no zero-shot head: {error}")
        return None


def require_model_of(bundle: Bundle, source: Found) -> None:
    """Raises WeightsError unless `source` has the weights of the bundle: in the space of another CLIP, the embedding of
    a text says nothing about the bundle's images.

    Compares the embedding of patches, which the bundle has as it is with any --precision.
    """
    backbone = load_weights(source)
    patch = source.family.outer(backbone.model, source.size)["patch.weight"].tobytes()
    with bundle.path(WEIGHTS_FILE).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stored:
        if stored.find(patch) < 0:
            raise WeightsError(
                f"{source.origin.source if source.origin else source.place} has other weights than the bundle at "
                f"{bundle.root}; pass the folder that it was exported from with --weights"
            )


def zero_shot_head(source: Found, classes: Sequence[str], templates: Sequence[str]) -> ZeroShot:
    """The directions (C, F) of the classes. Each is the mean over the prompts of a class.

    Underscores in class names become spaces. Computed in fp64, so that the fp32 result does not depend on the number of
    threads. Raises ConfigError for a template without exactly one '{}', WeightsError if the weights have no text tower
    or no tokenizer.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"--prompt {template!r} must contain '{{}}' once, as the place of the class name")
    origin, kind = source.origin, source.family.text_tower
    if origin is None or kind is None:
        raise WeightsError(f"the weights of {source.name} have no text tower; use weights of a whole CLIP model")
    try:
        config = kind.config_class.from_pretrained(origin.source, **origin.options)
    except Exception as error:  # transformers checks few values of a config
        raise origin.to_weights_error(error) from error
    check_config(config, origin.source)
    tower = load_pretrained(kind, origin, config).double().eval()
    tokenizer, longest = _tokenizer(origin), config.max_position_embeddings
    rows = []
    with torch.no_grad(), _double():
        for name in classes:
            prompts = [template.replace("{}", name.replace("_", " ")) for template in templates]
            tokens = tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            try:
                embedded = tower(**tokens).text_embeds
            except Exception as error:  # of any kind, from a bad value of the config
                raise origin.to_weights_error(error) from error
            texts = torch.nn.functional.normalize(embedded, dim=1)
            rows.append(torch.nn.functional.normalize(texts.mean(dim=0), dim=0).numpy())
    scale = tower.logit_scale.detach().exp().item()
    return ZeroShot(np.stack(rows).astype(np.float32), scale, tuple(templates))


@contextmanager
def _double() -> Iterator[None]:
    """Sets the default type to fp64. transformers makes its causal mask in that type."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _tokenizer(origin: Origin) -> Any:
    try:
        return AutoTokenizer.from_pretrained(origin.source, **origin.options)
    except (OSError, ValueError, TypeError) as error:  # TypeError: vocab.json is missing
        raise WeightsError(f"{origin.source} has no usable tokenizer; download the model again") from error
