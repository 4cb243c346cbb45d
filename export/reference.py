"""The reference in torch + PEFT on the whole model: initial trainables, and the results that graphs must equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from export.graph import Array
from export.weights import Backbone
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.bundle import ImagePreprocessing, LoraSpec, PeftSpec, Preprocessing, TextPreprocessing
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.peft_names import from_peft, to_peft


def add_lora(source: Backbone, lora: LoraSpec, level: int, seed: int) -> Any:
    """The classification model with PEFT's LoRA on the last `level` blocks. Changes `source.model`."""
    blocks = source.backbone.config.num_hidden_layers
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        layers_to_transform=list(range(blocks - level, blocks)),
        layers_pattern=source.family.layers_pattern,
        modules_to_save=["classifier"],
    )
    return get_peft_model(source.model, config)


@contextmanager
def peft_model(source: Backbone, lora: LoraSpec, level: int, seed: int) -> Iterator[Any]:
    """Like `add_lora`, but restores `source.model` on exit."""
    model = add_lora(source, lora, level, seed)
    try:
        yield model
    finally:
        model.unload()


def initial_expert(source: Backbone, lora: LoraSpec, peft: PeftSpec, layout: Layout, level: int, seed: int) -> Vector:
    """PEFT's initial LoRA (A Kaiming, B zero) with a zero head, as a flat vector (P,)."""
    with peft_model(source, lora, level, seed) as model:
        # with "auto" PEFT would ask the hub for the base model's vocabulary
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        state = {key: tensor.numpy() for key, tensor in tensors.items()}
    expert = from_peft(peft, state)
    for name in ("classifier.weight", "classifier.bias"):
        expert[name] = np.zeros_like(expert[name])
    return layout.join(expert)


def loss_and_gradient(
    source: Backbone,
    lora: LoraSpec,
    peft: PeftSpec,
    layout: Layout,
    level: int,
    theta: Vector,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
) -> tuple[float, Vector, Array]:
    """Mean cross-entropy, its gradient (P,) and the logits (B, C) of the whole model at `theta`."""
    with peft_model(source, lora, level, seed=0) as model:
        return model_gradient(model, peft, layout, theta, inputs, labels)


def model_gradient(
    model: Any,
    peft: PeftSpec,
    layout: Layout,
    theta: Vector,
    inputs: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
) -> tuple[float, Vector, Array]:
    """As `loss_and_gradient`, of a model with LoRA."""
    state = {key: torch.from_numpy(array.copy()) for key, array in to_peft(peft, layout.split(theta)).items()}
    set_peft_model_state_dict(model, state)
    logits = model(**inputs).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    gradients = {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return float(loss.detach()), layout.join(from_peft(peft, gradients)), logits.detach().float().numpy()


def torch_inputs(samples: Array, preprocessing: Preprocessing) -> dict[str, torch.Tensor]:
    """Converts inputs of a bundle's graphs, pixels (B, S, S, 3) or tokens (B, N), to inputs of transformers."""
    if isinstance(preprocessing, TextPreprocessing):
        tokens = torch.from_numpy(samples)
        return {"input_ids": tokens, "attention_mask": (tokens != preprocessing.pad_id).long()}
    return {"pixel_values": normalize_pixels(samples, preprocessing)}


def random_samples(source: Backbone, preprocessing: Preprocessing, count: int, rng: np.random.Generator) -> Array:
    """Pixels (B, S, S, 3), or tokens (B, N). The first text has N tokens, the others have random lengths."""
    if isinstance(preprocessing, TextPreprocessing):
        length = preprocessing.max_tokens
        tokens = rng.integers(0, source.model.config.vocab_size, (count, length))
        tokens[tokens == preprocessing.pad_id] += 1
        lengths = np.append(length, rng.integers(2, length, count - 1))
        return np.where(np.arange(length) < lengths[:, None], tokens, preprocessing.pad_id)
    return rng.integers(0, 256, (count, preprocessing.size, preprocessing.size, 3), dtype=np.uint8)


def normalize_pixels(pixels: Array, preprocessing: ImagePreprocessing) -> torch.Tensor:
    """uint8 RGB pixels (B, S, S, 3) → normalized `pixel_values` (B, 3, S, S) of transformers."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (scaled - mean) / std
