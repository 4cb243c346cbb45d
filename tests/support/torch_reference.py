"""What torch, transformers and PEFT compute with the models that bundles are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from peft.utils import set_peft_model_state_dict

from export.reference import peft_model, torch_inputs
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.peft_names import from_peft, to_peft
from support.bundles import Built, Floats

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it computes


def torch_step(
    built: Built, theta: Vector, samples: NDArray[Any], loss_of: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[float, Vector]:
    """The loss that `loss_of` makes of the logits of the whole model, torch + PEFT, and its gradient (P,)."""
    bundle, spec = built.bundle, built.bundle.manifest.peft
    with torch_expert(built, theta) as model:
        loss = loss_of(model(**torch_inputs(samples, bundle.manifest.preprocessing)).logits)
        loss.backward()
        gradients = {name: tensor.grad.numpy() for name, tensor in trainables(model).items()}
    return loss.item(), bundle.expert.join(from_peft(spec, gradients))


class torch_expert:  # noqa: N801 - a context manager
    """torch + PEFT over the whole model, with the trainables `theta` (P,) of whatever level."""

    def __init__(self, built: Built, theta: Vector) -> None:
        bundle = built.bundle
        level = next(k for k in range(bundle.manifest.levels + 1) if bundle.expert.size(k) == theta.size)
        self._context = peft_model(built.source, bundle.manifest.lora, level, seed=0)
        tensors = to_peft(bundle.manifest.peft, bundle.expert.split(theta))
        self._state = {key: torch.from_numpy(tensor.copy()) for key, tensor in tensors.items()}

    def __enter__(self) -> Any:
        model = self._context.__enter__()
        set_peft_model_state_dict(model, self._state)
        return model

    def __exit__(self, *reason: Any) -> None:
        self._context.__exit__(*reason)


def features_of(built: Built, samples: NDArray[Any]) -> Floats:
    """What transformers gives the classifier, of it the part that ours reads (B, F)."""
    seen: list[torch.Tensor] = []
    hook = built.source.model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        built.source.model(**torch_inputs(samples, built.bundle.manifest.preprocessing))
    hook.remove()
    return seen[0][:, : built.bundle.manifest.dims.feature].numpy()


def hidden_states(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[Floats]:
    """A torch model's states (B, N, D) below each block and above the last, with zeros for padded tokens as in ours."""
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"][..., None] if "attention_mask" in inputs else 1
    return [(state * real).numpy() for state in states]


def trainables(model: Any) -> dict[str, Any]:
    """A PEFT model's trainable parameters under the names of `adapter_model.safetensors`."""
    return {
        name.replace(".default", "").replace(".modules_to_save", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
