"""`Family`: the description of one architecture for `export.transformer` and the comparison with PEFT.

To add a family, add one module with a `Family` object and its entry in `export.families`. Canonical weights are named
in `export.transformer`. The optional weights that a family provides (layer scale, norm after the embeddings, final
norm, pooler, projection) determine the operations of its graphs. Every build compares the graphs with torch + PEFT
(`export.parity`), so a wrong description fails.
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
from fedfmsl.protocol.bundle import RGB, LoraSpec

HALF: RGB = (0.5, 0.5, 0.5)
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
ACTIVATIONS = ("gelu", "quick_gelu")
LORA_TARGETS = ("query", "value")  # canonical names of the projections with LoRA


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, identified by `model_type` in its config.

    `size` in the functions below is pixels per side of an image, or tokens of a text.
    """

    model_type: str
    reference: type[Any]  # transformers class with `classifier`, which PEFT wraps
    backbone: str  # attribute of the reference that contains the blocks
    layers: str  # path of the list of blocks within the backbone
    block_keys: Mapping[str, str]  # canonical name → path within a block
    geometry: Callable[[Any, int], Geometry]  # (config, size); raises ConfigError if unsupported
    outer: Callable[[Any, int], dict[str, Array]]  # (reference, size) → canonical weights outside the blocks
    input: Literal["pixels", "tokens"] = "pixels"
    mean: RGB = HALF
    std: RGB = HALF
    any_size: bool = False  # whether images may have other sizes than `image_size` of the config
    classifier_width: int = 1  # input width of the reference's classifier, in F
    optimum_model: Callable[[Any], Any] | None = None  # reference → model for optimum; default: the backbone
    text_tower: type[Any] | None = None  # class with `logit_scale` and `text_embeds` (F,)

    def projection(self, block: int, target: str) -> str:
        """Name of a block's projection with LoRA, within the backbone."""
        return f"{self.layers}.{block}.{self.block_keys[target]}"

    @property
    def layers_pattern(self) -> str:
        """PEFT's name of the list of blocks."""
        return self.layers.rpartition(".")[2]

    def lora(self, rank: int) -> LoraSpec:
        """LoRA with alpha 2r on the query and value projections, under their PEFT names."""
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
    """`{name}.weight` and `{name}.bias` of a norm, a convolution or a projection.

    The weight of a projection is transposed to (in, out). A missing bias is zeros.
    """
    weight = array(module.weight)
    if isinstance(module, torch.nn.Linear):
        weight = np.ascontiguousarray(weight.T)
    bias = np.zeros(module.weight.shape[0], np.float32) if module.bias is None else array(module.bias)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def patches(config: Any, size: int) -> int:
    """Number of patches of an image. Raises ConfigError if `size` is not a multiple of the patch size."""
    if size % config.patch_size:
        raise ConfigError(
            f"--image-size {size} is not a multiple of the patch size {config.patch_size}; choose a multiple"
        )
    return int((size // config.patch_size) ** 2)


def vision_geometry(config: Any, size: int) -> Geometry:
    """Geometry of a pre-norm vision transformer with one class token.

    Raises ConfigError for an unsupported image size or activation.
    """
    if config.hidden_act not in ACTIVATIONS:
        supported = " and ".join(ACTIVATIONS)
        raise ConfigError(
            f"{config.model_type} with activation {config.hidden_act!r} is not supported, only {supported}"
        )
    return Geometry(
        tokens=patches(config, size) + 1,
        hidden=config.hidden_size,
        feature=config.hidden_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        norm_eps=config.layer_norm_eps,
        activation=config.hidden_act,
        patch=config.patch_size,
    )


def native_geometry(config: Any, size: int) -> Geometry:
    """`vision_geometry` of a model whose position embedding is for one image size. Raises ConfigError for another."""
    geometry = vision_geometry(config, size)
    if size != config.image_size:
        raise ConfigError(
            f"this {config.model_type} model takes images of {config.image_size} px only, not --image-size {size}; "
            "omit --image-size"
        )
    return geometry
