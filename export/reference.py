"""The same mathematics in torch + PEFT over the whole model: where the trainables start, and what graphs must equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from export.graph import Array
from export.weights import Backbone
from protocol.bundle import LoraSpec, PeftSpec, Preprocessing
from protocol.layout import Layout, Vector
from protocol.peft_names import from_peft, to_peft


def add_lora(source: Backbone, lora: LoraSpec, level: int, seed: int) -> Any:
    """The classification model with PEFT's LoRA on the `level` last blocks. It changes `source.model`."""
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
    """The same, but the model is restored on leaving."""
    model = add_lora(source, lora, level, seed)
    try:
        yield model
    finally:
        model.unload()


def initial_expert(source: Backbone, lora: LoraSpec, peft: PeftSpec, layout: Layout, level: int, seed: int) -> Vector:
    """PEFT's own start (A Kaiming, B zero) with a zero head, as a flat vector (P,)."""
    with peft_model(source, lora, level, seed) as model:
        state = {key: tensor.numpy() for key, tensor in get_peft_model_state_dict(model).items()}
    tensors = from_peft(peft, state)
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = np.zeros_like(tensors[name])
    return layout.join(tensors)


def loss_and_gradient(
    source: Backbone,
    lora: LoraSpec,
    peft: PeftSpec,
    layout: Layout,
    level: int,
    theta: Vector,
    pixels: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[float, Vector, Array]:
    """Mean cross-entropy, its gradient (P,) and the logits (B, C) of the whole model at `theta`."""
    with peft_model(source, lora, level, seed=0) as model:
        state = {key: torch.from_numpy(array.copy()) for key, array in to_peft(peft, layout.split(theta)).items()}
        set_peft_model_state_dict(model, state)
        logits = model(pixel_values=pixels).logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        gradients = {
            name.replace(".default", "").replace(".modules_to_save", ""): parameter.grad.numpy()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
    return float(loss.detach()), layout.join(from_peft(peft, gradients)), logits.detach().numpy()


def normalised(pixels: Array, preprocessing: Preprocessing) -> torch.Tensor:
    """uint8 RGB (B, S, S, 3) → what transformers calls pixel_values, (B, 3, S, S)."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (scaled - mean) / std
