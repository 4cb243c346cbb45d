"""A bundle's graphs, compared with torch + PEFT and transformers on the whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.bundles import (
    LAYERS,
    Built,
    as_input,
    hidden_of,
    random_samples,
    random_theta,
    relative_error,
    run_graph,
    with_classes,
)
from support.samples import CLASSES
from support.torch_reference import features_of, hidden_states, torch_expert

from export.reference import torch_inputs
from fedfmsl.algorithms.calibration import calibrate
from fedfmsl.algorithms.mixture import Biases, gate_offset, log_softmax, mix

TOLERANCE = 1e-5
LEVELS = [1, 2, LAYERS]
C = len(CLASSES)


@pytest.mark.parametrize("level", LEVELS)
def test_logits_equal_torch_and_peft(built: Built, level: int) -> None:
    samples, theta = random_samples(built, 5, seed=level), random_theta(built.bundle, level, 1)
    with torch.no_grad(), torch_expert(built, theta) as model:
        logits = model(**torch_inputs(samples, built.bundle.manifest.preprocessing)).logits.numpy()
    (ours,) = run_graph(
        built.bundle, f"predict-{level}.onnx", ["logits"], hidden=hidden_of(built, samples, level), theta=theta
    )
    assert relative_error(ours, logits) < TOLERANCE


def test_features_pooled_and_optimums_backbone_equal_transformers(built: Built) -> None:
    samples = random_samples(built, 3, seed=11)
    inputs = torch_inputs(samples, built.bundle.manifest.preprocessing)
    with torch.no_grad():
        last = built.source.backbone(**inputs).last_hidden_state.numpy()
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    if built.source.family.input == "tokens":
        arrays["token_type_ids"] = np.zeros_like(samples)
    (pooled,) = run_graph(built.bundle, "features.onnx", ["pooled"], **as_input(built, samples))
    (from_optimum,) = run_graph(built.bundle, "backbone.onnx", ["last_hidden_state"], **arrays)
    assert relative_error(pooled, features_of(built, samples)) < TOLERANCE
    assert relative_error(from_optimum, last) < 1e-4


def test_hidden_states_and_lifts_equal_the_blocks_of_transformers_with_peft(built: Built) -> None:
    samples, theta = random_samples(built, 3, seed=12), random_theta(built.bundle, LAYERS, 6)
    inputs = torch_inputs(samples, built.bundle.manifest.preprocessing)
    frozen = hidden_states(built.source.backbone, inputs)
    with torch_expert(built, theta) as model:
        adapted = hidden_states(model, inputs)
    for level in LEVELS:
        assert relative_error(hidden_of(built, samples, level), frozen[LAYERS - level]) < TOLERANCE
    for block in range(LAYERS - 1):
        lora = theta[built.bundle.expert.parts[str(block)]]
        below, above = adapted[block], adapted[block + 1]
        (lifted,) = run_graph(built.bundle, f"lift-{block}.onnx", ["lifted"], hidden=below, theta=lora)
        assert relative_error(lifted, above) < TOLERANCE
        assert relative_error(lifted, frozen[block + 1]) > 100 * TOLERANCE  # the LoRA changes the state


def torch_gate(pooled: torch.Tensor, offset: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    normal = torch.nn.functional.layer_norm(pooled, pooled.shape[1:])
    inner = torch.nn.functional.linear(normal, parts["gate.down.weight"], parts["gate.down.bias"])
    outer = torch.nn.functional.gelu(inner) @ parts["gate.up.weight"].T + parts["gate.up.bias"]
    return torch.log_softmax(offset + outer, dim=1)


def test_gate_loss_and_gradient_equal_torch(built: Built) -> None:
    rng, layout = np.random.default_rng(0), built.bundle.gate
    theta = rng.normal(0, 0.5, layout.total).astype(np.float32)
    pooled = rng.normal(1, 2, (6, built.bundle.manifest.dims.feature)).astype(np.float32)
    log_p, offset = np.log(rng.uniform(1e-3, 1, (2, 6, 2))).astype(np.float32)
    weights = rng.uniform(0, 1, 6).astype(np.float32)
    parts = {name: torch.from_numpy(part.copy()).requires_grad_() for name, part in layout.split(theta).items()}
    log_gate = torch_gate(torch.from_numpy(pooled), torch.from_numpy(offset), parts)
    loss = -(torch.from_numpy(weights) * torch.logsumexp(log_gate + torch.from_numpy(log_p), dim=1)).sum()
    loss.backward()
    gradients = {name: part.grad.numpy() for name, part in parts.items() if part.grad is not None}

    inputs = {"pooled": pooled, "offset": offset, "gate_theta": theta}
    our_loss, our_gradient = run_graph(
        built.bundle, "gate-step.onnx", ["loss", "gradient"], expert_log_p=log_p, weights=weights, **inputs
    )
    (our_log_gate,) = run_graph(built.bundle, "gate-predict.onnx", ["log_gate"], **inputs)
    assert relative_error(our_log_gate, log_gate.detach().numpy()) < TOLERANCE
    assert relative_error(our_loss, loss.item()) < TOLERANCE
    assert relative_error(our_gradient, layout.join(gradients)) < TOLERANCE


def test_the_initial_gate_is_bayes_rule(built: Built) -> None:
    rng = np.random.default_rng(1)
    pooled = rng.normal(size=(4, built.bundle.manifest.dims.feature)).astype(np.float32)
    offset = rng.normal(0, 3, (4, 2)).astype(np.float32)
    inputs = {"pooled": pooled, "offset": offset, "gate_theta": built.bundle.initial()[1]}
    (log_gate,) = run_graph(built.bundle, "gate-predict.onnx", ["log_gate"], **inputs)
    assert np.allclose(log_gate, log_softmax(offset), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
@pytest.mark.parametrize("level", LEVELS)
def test_the_personalized_graph_equals_the_mixture_of_its_experts_and_gate(
    built: Built, level: int, temperature: float
) -> None:
    check_the_personalized_graph(built, level, temperature, np.array([3, 0, 8, 1]))


@pytest.mark.parametrize("classes", [2, 9])
def test_the_personalized_graph_takes_any_number_of_classes(vit: Built, classes: int) -> None:
    check_the_personalized_graph(with_classes(vit, classes), 2, 0.4, np.arange(classes))


def check_the_personalized_graph(built: Built, level: int, temperature: float, counts: NDArray[np.int64]) -> None:
    """`counts` (C,): the device's samples of each class."""
    bundle, rng = built.bundle, np.random.default_rng(level)
    samples = as_input(built, random_samples(built, 5, seed=13))
    thetas = {expert: random_theta(bundle, level, seed) for seed, expert in enumerate(("global", "local"))}
    biases = Biases.of_counts(counts)
    gate_theta = rng.normal(0, 0.5, bundle.gate.total).astype(np.float32)
    hidden, pooled = run_graph(bundle, "features.onnx", [f"hidden_{level}", "pooled"], **samples)
    logits = {
        expert: run_graph(bundle, f"predict-{level}.onnx", ["logits"], hidden=hidden, theta=theta)[0]
        for expert, theta in thetas.items()
    }
    log_p = log_softmax(logits["global"] + biases.kept), log_softmax(logits["local"] + biases.held)
    offset = gate_offset(logits["global"], biases)
    (log_gate,) = run_graph(
        bundle, "gate-predict.onnx", ["log_gate"], pooled=pooled, offset=offset, gate_theta=gate_theta
    )
    probabilities, gate = run_graph(
        bundle,
        f"personal-{level}.onnx",
        ["probabilities", "gate"],
        **samples,
        gate_theta=gate_theta,
        temperature=np.array([temperature], np.float32),
        **{f"{expert}_theta": theta for expert, theta in thetas.items()},
        kept_bias=biases.kept,
        given_bias=biases.given,
        held_bias=biases.held,
    )
    assert np.allclose(gate, np.exp(log_gate), atol=1e-6)
    assert np.allclose(probabilities, np.exp(calibrate(mix(log_gate, *log_p), temperature)), atol=1e-5)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
