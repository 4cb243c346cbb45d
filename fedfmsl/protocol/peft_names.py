"""PEFT's names of the trainables, so that the global expert can be saved as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfmsl.protocol.bundle import PeftSpec

_ROOT = "base_model.model."
Tensors = Mapping[str, NDArray[Any]]


def to_peft(spec: PeftSpec, tensors: Tensors) -> dict[str, NDArray[Any]]:
    """Layout names → keys of `adapter_model.safetensors`. Pads the head with zeros to the width of the classifier."""
    renamed = {}
    for name, tensor in tensors.items():
        if name == "classifier.weight":
            missing = spec.classifier_width - tensor.shape[1]
            tensor = np.pad(tensor, ((0, 0), (0, missing)))
        head = name.startswith("classifier.")
        renamed[_ROOT + (name if head else f"{spec.prefix}.{name}")] = tensor
    return renamed


def from_peft(spec: PeftSpec, tensors: Tensors) -> dict[str, NDArray[Any]]:
    """The inverse of `to_peft`."""
    renamed = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_ROOT).removeprefix(f"{spec.prefix}.")
        if name == "classifier.weight":
            tensor = tensor[:, : spec.head_width]
        renamed[name] = tensor
    return renamed
