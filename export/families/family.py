"""What a family of backbones must say, so that `export.transformer` and the comparison with PEFT can take it.

A new family is one small file with one object of `Family`, and its line in `export.families`. Its canonical weights are
the ones named in `export.transformer`; which of the optional ones it gives (layer scale, a norm after the embeddings,
final norm, pooler, projection) decides which operations its graphs have. One that is wrong cannot pass the comparison
with torch and PEFT that every build ends with (`export.parity`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from export.graph import Array
from export.transformer import Geometry
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.bundle import LoraSpec

RGB = tuple[float, float, float]
HALF: RGB = (0.5, 0.5, 0.5)
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
ACTIVATIONS = ("gelu", "quick_gelu")
LORA_TARGETS = ("query", "value")  # canonical names of the projections that carry LoRA


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, identified by its config's `model_type`.

    `size` is pixels per side of an image, or tokens of a text, after `input`.
    """

    model_type: str
    reference: type[Any]  # transformers class whose `logits` are `classifier` of the feature: what PEFT wraps
    backbone: str  # the reference's attribute that holds the blocks
    layers: str  # path, within the backbone, of the list of blocks
    block_keys: Mapping[str, str]  # canonical name → path within a block
    geometry: Callable[[Any, int], Geometry]  # (config, size); ConfigError for what the graphs do not cover
    outer: Callable[[Any, int], dict[str, Array]]  # (reference, size) → canonical weights outside the blocks
    input: Literal["pixels", "tokens"] = "pixels"
    mean: RGB = HALF
    std: RGB = HALF
    classifier_width: int = 1  # of the reference, in multiples of the feature's width
    witness: Callable[[Any], Any] | None = None  # reference → what optimum exports, if that is not its backbone
    text_tower: type[Any] | None = None  # class with `text_embeds` in the feature's space, and `logit_scale`

    def projection(self, block: int, target: str) -> str:
        """Name, within the backbone, of a block's projection that carries LoRA."""
        return f"{self.layers}.{block}.{self.block_keys[target]}"

    @property
    def layers_pattern(self) -> str:
        """What PEFT calls the list of blocks."""
        return self.layers.rpartition(".")[2]

    def lora(self, rank: int) -> LoraSpec:
        """LoRA of alpha 2r on this family's query and value projections, under PEFT's names of them."""
        targets = tuple(self.block_keys[target].rpartition(".")[2] for target in LORA_TARGETS)
        return LoraSpec(rank=rank, alpha=2 * rank, targets=targets)

    def weights(self, model: Any, size: int) -> dict[str, Array]:
        """The reference's frozen weights under `export.transformer`'s canonical names."""
        weights = self.outer(model, size)
        for index, block in enumerate(getattr(model, self.backbone).get_submodule(self.layers)):
            for name, key in self.block_keys.items():
                canonical = f"blocks.{index}.{name}"
                if name.startswith("scale"):
                    weights[canonical] = array(block.get_parameter(key))
                else:
                    weights |= affine(canonical, block.get_submodule(key))
        return weights


def array(tensor: torch.Tensor) -> Array:
    result: Array = tensor.detach().float().numpy()
    return result


def affine(name: str, module: Any) -> dict[str, Array]:
    """`{name}.weight` and `{name}.bias` of a norm, a convolution or a projection, the latter's weight as (in, out);
    zeros where there is no bias."""
    weight = array(module.weight)
    if isinstance(module, torch.nn.Linear):
        weight = np.ascontiguousarray(weight.T)
    bias = np.zeros(module.weight.shape[0], np.float32) if module.bias is None else array(module.bias)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def patches(config: Any, size: int) -> int:
    """Number of patches of an image. Raises ConfigError unless patches tile it."""
    if size % config.patch_size:
        raise ConfigError(f"--image-size {size} is not a multiple of the patch size {config.patch_size}")
    return int((size // config.patch_size) ** 2)


def vision_geometry(config: Any, size: int) -> Geometry:
    """Of a pre-norm vision transformer with one class token. Raises ConfigError for an image size or an activation that
    its graphs do not cover."""
    if config.hidden_act not in ACTIVATIONS:
        known = " and ".join(ACTIVATIONS)
        raise ConfigError(f"{config.model_type} with activation {config.hidden_act!r} is not supported, only {known}")
    return Geometry(
        tokens=patches(config, size) + 1,
        hidden=config.hidden_size,
        feature=config.hidden_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        epsilon=config.layer_norm_eps,
        activation=config.hidden_act,
        patch=config.patch_size,
    )


def native_only(config: Any, size: int) -> None:
    """Raises ConfigError for an image size that the position embedding was not trained for."""
    if size != config.image_size:
        raise ConfigError(
            f"this {config.model_type} model takes images of {config.image_size} px only, not --image-size {size}"
        )
