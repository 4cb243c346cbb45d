"""The model that a federated client in torch trains: transformers + PEFT, in each precision, compiled or not."""

from __future__ import annotations

from contextlib import AbstractContextManager
from enum import Enum
from typing import Any

import torch

from export.reference import add_lora
from export.weights import Backbone, load_backbone
from fedfmsl.protocol.bundle import TOKENIZER, TextPreprocessing
from fedfmsl.protocol.task_bundle import TaskBundle


class Precision(str, Enum):
    """Of the frozen weights and of matrix products. LoRA, head and gradients are in fp32 in all of them."""

    FP32 = "fp32"
    AUTOCAST = "bf16 (autocast)"  # frozen weights in fp32, cast in every step
    BF16 = "bf16"  # frozen weights in bf16

    def products(self) -> AbstractContextManager[object]:
        """The context in which to run a step."""
        context: AbstractContextManager[object] = torch.autocast("cpu", torch.bfloat16, enabled=self is not self.FP32)
        return context

    def freeze(self, model: Any) -> None:
        """Converts what is not trained."""
        if self is self.BF16:
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)


def load_source(bundle: TaskBundle, model: str, weights: str | None, seed: int) -> Backbone:
    """The model of the bundle, before LoRA is added."""
    preprocessing, tokenizer = bundle.manifest.preprocessing, None
    if isinstance(preprocessing, TextPreprocessing):
        size, tokenizer = preprocessing.max_tokens, bundle.path(TOKENIZER)
    else:
        size = preprocessing.size
    source = load_backbone(model, weights, len(bundle.classes), size, None, seed, tokenizer)
    source.model.set_attn_implementation("sdpa")  # the default of transformers
    return source


def load_model(source: Backbone, bundle: TaskBundle, level: int, precision: Precision, seed: int) -> Any:
    """The classification model with LoRA in the last `level` blocks, in training mode. Changes `source`."""
    model = add_lora(source, bundle.manifest.lora, level, seed)
    precision.freeze(model)
    return model.train()
