"""A bundle's graphs against torch + PEFT and transformers over the whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import (
    CLASSES,
    LAYERS,
    Built,
    Floats,
    as_input,
    features_of,
    hidden_states,
    random_samples,
    random_theta,
    relative_error,
    run_graph,
    torch_expert,
    torch_step,
    trainables,
)

from edge_runtime.engine import NEVER, Batch, Fit, StepGraphEngine
from edge_runtime.mixture import log_softmax, mix
from edge_runtime.optimizer import AdamW
from export.reference import loss_and_gradient, torch_inputs
from protocol.layout import HEAD
from protocol.peft_names import from_peft

TOLERANCE = 1e-5
LEVELS = [1, 2, LAYERS]
C = len(CLASSES)


def hidden_of(built: Built, samples: np.ndarray, level: int) -> Floats:
    return run_graph(built.bundle, "features.onnx", [f"hidden_{level}"], **as_input(built, samples))[0]


def step_graph(
    built: Built, level: int, theta: Floats, samples: np.ndarray, labels: np.ndarray, **given: Floats
) -> tuple[float, Floats]:
    size = len(labels)
    defaults = {
        "weights": np.full(size, 1 / size, np.float32),
        "gate": np.zeros(size, np.float32),
        "other": np.full(size, NEVER, np.float32),
        "bias": np.zeros(C, np.float32),
    }
    loss, gradient = run_graph(
        built.bundle,
        f"step-{level}.onnx",
        ["loss", "gradient"],
        hidden=hidden_of(built, samples, level),
        labels=labels,
        theta=theta,
        **{**defaults, **given},
    )
    return float(loss), gradient


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "labels",
    [
        pytest.param([2], id="batch of one"),
        pytest.param([1, 1, 1], id="one class only"),
        pytest.param([0, 1, 2, 3, 3, 0, 1], id="odd batch"),
    ],
)
def test_loss_gradient_and_logits_equal_torch_and_peft(built: Built, level: int, labels: list[int]) -> None:
    samples, theta, wanted = (
        random_samples(built, len(labels), seed=level),
        random_theta(built.bundle, level, 1),
        np.array(labels),
    )
    manifest = built.bundle.manifest
    loss, gradient, logits = loss_and_gradient(
        built.source,
        manifest.lora,
        manifest.peft,
        built.bundle.expert,
        level,
        theta,
        torch_inputs(samples, manifest.preprocessing),
        torch.from_numpy(wanted),
    )
    our_loss, our_gradient = step_graph(built, level, theta, samples, wanted)
    (our_logits,) = run_graph(
        built.bundle, f"predict-{level}.onnx", ["logits"], hidden=hidden_of(built, samples, level), theta=theta
    )
    assert relative_error(our_loss, loss) < TOLERANCE
    assert relative_error(our_logits, logits) < TOLERANCE
    for name, part in built.bundle.expert.split(gradient).items():  # each tensor on its own scale
        assert relative_error(built.bundle.expert.split(our_gradient)[name], part) < TOLERANCE, name


@pytest.mark.parametrize("level", LEVELS)
def test_weights_mask_and_mixture_loss_equal_torch_autograd(built: Built, level: int) -> None:
    rng = np.random.default_rng(level)
    samples, labels = random_samples(built, 5, seed=7), np.array([0, 1, 3, 1, 0])
    theta = random_theta(built.bundle, level, 2)
    given = {
        "weights": np.array([0.5, 0.0, 0.1, 2.0, 0.25], np.float32),
        "gate": np.log(rng.uniform(0.1, 0.9, 5)).astype(np.float32),
        "other": np.array([-0.5, -1.0, -8.0, NEVER, -2.0], np.float32),
        "bias": np.array([0.3, -0.7, NEVER, 0.0], np.float32),
    }

    def mixture_loss(logits: torch.Tensor) -> torch.Tensor:
        weights, gate, other, bias = (torch.from_numpy(given[key]) for key in ("weights", "gate", "other", "bias"))
        own = torch.log_softmax(logits + bias, dim=1)[torch.arange(5), torch.from_numpy(labels)]
        return -(weights * torch.logaddexp(gate + own, other)).sum()

    loss, gradient = torch_step(built, theta, samples, mixture_loss)
    our_loss, our_gradient = step_graph(built, level, theta, samples, labels, **given)
    assert relative_error(our_loss, loss) < TOLERANCE
    assert relative_error(our_gradient, gradient) < TOLERANCE


@pytest.mark.parametrize("level", LEVELS)
def test_masked_classes_get_no_gradient(vit: Built, level: int) -> None:
    bias = np.array([0, NEVER, 0, NEVER], np.float32)
    _, gradient = step_graph(
        vit, level, random_theta(vit.bundle, level, 3), random_samples(vit, 4, 3), np.array([0, 2, 2, 0]), bias=bias
    )
    head = vit.bundle.expert.split(gradient)["classifier.weight"]
    assert np.all(head[[1, 3]] == 0)
    assert np.all(np.abs(head[[0, 2]]).max(axis=1) > 0)


@pytest.mark.parametrize("level", [1, LAYERS])
@pytest.mark.parametrize("fit", [Fit(3), Fit(8), Fit(8, lean=True)])
def test_twenty_adamw_steps_of_the_engine_equal_torch_over_the_whole_model(built: Built, level: int, fit: Fit) -> None:
    bundle, manifest = built.bundle, built.bundle.manifest
    rng = np.random.default_rng(5)
    samples, labels = random_samples(built, 24, seed=5), rng.integers(0, C, 24)
    batches = [rng.choice(24, size, replace=False) for size in (8, 7, 4, 1) * 5]
    theta, rate, decay = random_theta(bundle, level, 4), 1e-3, 0.05

    per_parameter = np.full(theta.size, decay, np.float32)
    per_parameter[bundle.expert.parts[HEAD]] = 0.0
    engine = StepGraphEngine(bundle, threads=1, fits={level: fit})
    engine.load(level)
    engine.set(theta, AdamW(rate, per_parameter))
    hidden = hidden_of(built, samples, level)
    zeros, never, bias = np.zeros(24, np.float32), np.full(24, NEVER, np.float32), np.zeros(C, np.float32)
    losses = [engine.step(Batch(hidden[b], labels[b], zeros[b], never[b], bias)) for b in batches]

    with torch_expert(built, theta) as model:
        head = [p for name, p in trainables(model).items() if "classifier" in name]
        lora = [p for name, p in trainables(model).items() if "classifier" not in name]
        optimizer = torch.optim.AdamW(
            [{"params": head, "weight_decay": 0.0}, {"params": lora, "weight_decay": decay}], lr=rate
        )
        inputs, wanted, theirs = torch_inputs(samples, manifest.preprocessing), torch.from_numpy(labels), []
        for batch in batches:
            optimizer.zero_grad()
            chosen = {name: tensor[batch] for name, tensor in inputs.items()}
            loss = torch.nn.functional.cross_entropy(model(**chosen).logits, wanted[batch])
            loss.backward()
            for parameter in head:  # transformers' DINOv2 classifier also reads the mean patch; ours does not
                parameter.grad[..., 32:] = 0
            optimizer.step()
            theirs.append(loss.item())
        state = {name: p.detach().numpy() for name, p in trainables(model).items()}
        trained = bundle.expert.join(from_peft(manifest.peft, state))
    assert np.abs(trained - theta).max() > 10 * rate  # they have moved
    assert np.abs(engine.get() - trained).max() < 1e-4
    assert losses == pytest.approx(theirs, rel=1e-4)


def test_an_engine_without_an_optimizer_refuses_to_train(vit: Built) -> None:
    engine = StepGraphEngine(vit.bundle, threads=1)
    engine.load(1)
    engine.set(random_theta(vit.bundle, 1, 0), AdamW(1e-3, np.zeros(vit.bundle.expert.size(1), np.float32)))
    engine.load(1)  # drops it
    with pytest.raises(RuntimeError, match="optimizer"):
        engine.step(Batch(*(np.zeros(1, np.float32),) * 5))  # type: ignore[arg-type]


def test_features_pooled_and_optimums_backbone_equal_transformers(built: Built) -> None:
    samples = random_samples(built, 3, seed=11)
    inputs = torch_inputs(samples, built.bundle.manifest.preprocessing)
    with torch.no_grad():
        last = built.source.backbone(**inputs).last_hidden_state.numpy()
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    if built.source.family.input == "tokens":
        given["token_type_ids"] = np.zeros_like(samples)
    (pooled,) = run_graph(built.bundle, "features.onnx", ["pooled"], **as_input(built, samples))
    (witness,) = run_graph(built.bundle, "backbone.onnx", ["last_hidden_state"], **given)
    assert relative_error(pooled, features_of(built, samples)) < TOLERANCE
    assert relative_error(witness, last) < 1e-4


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
        assert relative_error(lifted, frozen[block + 1]) > 100 * TOLERANCE  # the LoRA does something


def torch_gate(pooled: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    normal = torch.nn.functional.layer_norm(pooled, pooled.shape[1:])
    inner = torch.nn.functional.linear(normal, parts["gate.down.weight"], parts["gate.down.bias"])
    outer = torch.nn.functional.gelu(inner) @ parts["gate.up.weight"].T + parts["gate.up.bias"]
    return torch.log_softmax(outer, dim=1)


def test_gate_loss_and_gradient_equal_torch(built: Built) -> None:
    rng, layout = np.random.default_rng(0), built.bundle.gate
    theta = rng.normal(0, 0.5, layout.total).astype(np.float32)
    pooled = rng.normal(1, 2, (6, built.bundle.manifest.dims.feature)).astype(np.float32)
    log_p = np.log(rng.uniform(1e-3, 1, (6, 2))).astype(np.float32)
    weights = rng.uniform(0, 1, 6).astype(np.float32)
    parts = {name: torch.from_numpy(part.copy()).requires_grad_() for name, part in layout.split(theta).items()}
    log_gate = torch_gate(torch.from_numpy(pooled), parts)
    loss = -(torch.from_numpy(weights) * torch.logsumexp(log_gate + torch.from_numpy(log_p), dim=1)).sum()
    loss.backward()
    gradients = {name: part.grad.numpy() for name, part in parts.items() if part.grad is not None}

    inputs = {"pooled": pooled, "gate_theta": theta}
    our_loss, our_gradient = run_graph(
        built.bundle, "gate-step.onnx", ["loss", "gradient"], expert_log_p=log_p, weights=weights, **inputs
    )
    (our_log_gate,) = run_graph(built.bundle, "gate-predict.onnx", ["log_gate"], **inputs)
    assert relative_error(our_log_gate, log_gate.detach().numpy()) < TOLERANCE
    assert relative_error(our_loss, loss.item()) < TOLERANCE
    assert relative_error(our_gradient, layout.join(gradients)) < TOLERANCE


def test_the_initial_gate_weighs_both_experts_the_same(built: Built) -> None:
    pooled = np.random.default_rng(1).normal(size=(4, built.bundle.manifest.dims.feature)).astype(np.float32)
    (log_gate,) = run_graph(
        built.bundle, "gate-predict.onnx", ["log_gate"], pooled=pooled, gate_theta=built.bundle.initial()[1]
    )
    assert np.allclose(np.exp(log_gate), 0.5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_the_personalized_graph_equals_the_mixture_of_its_experts_and_gate(built: Built, level: int) -> None:
    bundle, rng = built.bundle, np.random.default_rng(level)
    samples = as_input(built, random_samples(built, 5, seed=13))
    thetas = {expert: random_theta(bundle, level, seed) for seed, expert in enumerate(("global", "local"))}
    biases = {
        "global": np.log(rng.dirichlet(np.ones(C))).astype(np.float32),
        "local": np.array([0, NEVER, 0, 0], np.float32),
    }
    gate_theta = rng.normal(0, 0.5, bundle.gate.total).astype(np.float32)
    hidden, pooled = run_graph(bundle, "features.onnx", [f"hidden_{level}", "pooled"], **samples)
    log_p = [
        log_softmax(
            run_graph(bundle, f"predict-{level}.onnx", ["logits"], hidden=hidden, theta=thetas[expert])[0]
            + biases[expert]
        )
        for expert in ("global", "local")
    ]
    (log_gate,) = run_graph(bundle, "gate-predict.onnx", ["log_gate"], pooled=pooled, gate_theta=gate_theta)
    probabilities, gate = run_graph(
        bundle,
        f"personal-{level}.onnx",
        ["probabilities", "gate"],
        **samples,
        gate_theta=gate_theta,
        **{f"{expert}_theta": theta for expert, theta in thetas.items()},
        **{f"{expert}_bias": bias for expert, bias in biases.items()},
    )
    assert np.allclose(gate, np.exp(log_gate), atol=1e-6)
    assert np.allclose(probabilities, np.exp(mix(log_gate, *log_p)), atol=1e-5)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
