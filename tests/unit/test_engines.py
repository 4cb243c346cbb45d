"""Both engines, compared with torch + PEFT on the whole model.

`OrtTrainingEngine` needs onnxruntime-training in place of the standard package, so `make test` runs this file twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.bundles import (
    LAYERS,
    Built,
    Floats,
    build,
    hidden_of,
    random_samples,
    random_theta,
    relative_error,
    run_graph,
    with_classes,
)
from support.samples import CLASSES
from support.torch_reference import torch_expert, torch_step, trainables
from support.training_contexts import announced_round, initial_globals, training_context

from edge_runtime.engines import Batch, Engine, MemoryPlan, StepGraphEngine, open_engine
from edge_runtime.engines.base import expert_decay
from edge_runtime.engines.ort_training import OrtTrainingEngine, TrainingSession
from edge_runtime.engines.step_graph import default_micro_batch
from edge_runtime.training.local_expert import train_personal
from edge_runtime.training.stages import train_global
from export.bundle import build_bundle
from export.reference import torch_inputs
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import NEVER
from fedfmsl.common.onnx_runtime import has_ort_training
from fedfmsl.errors import BundleError, ConfigError
from fedfmsl.protocol.bundle import Dims
from fedfmsl.protocol.messages import Stage, Training
from fedfmsl.protocol.peft_names import from_peft
from fedfmsl.protocol.task_bundle import TaskBundle

TOLERANCE = 1e-5
# ONNX Runtime 1.19, and 1.32 on processors without AVX-512, sum in another order. Errors are larger in post-norm blocks
# (1.1e-5 was measured with both).
TOLERANCES = {"bert": 2e-5}
LEVELS = [1, 2, LAYERS]
RATE, DECAY = 1e-3, 0.05
C = len(CLASSES)
Inputs = dict[str, NDArray[Any]]

WITH_ORT_TRAINING = (
    pytest.mark.ort_training,
    pytest.mark.skipif(not has_ort_training(), reason="the standard ONNX Runtime is installed"),
)
without_ort_training = pytest.mark.skipif(has_ort_training(), reason="onnxruntime-training is installed")


def step_graph(bundle: TaskBundle, level: int, theta: Floats, inputs: Inputs) -> tuple[float, Floats]:
    loss, gradient = run_graph(bundle, f"step-{level}.onnx", ["loss", "gradient"], theta=theta, **inputs)
    return float(loss), gradient


def ort_training(bundle: TaskBundle, level: int, theta: Floats, inputs: Inputs) -> tuple[float, Floats]:
    session = TrainingSession(bundle, level, theta, learning_rate=1e-3, threads=1)
    loss = session.add_gradient(inputs)
    assert np.array_equal(session.get(), theta)
    return loss, bundle.expert.join({name: parameter.grad for name, parameter in session.state.parameters})


def with_ort_training(test: Callable[..., None]) -> Callable[..., None]:
    for mark in WITH_ORT_TRAINING:
        test = mark(test)
    return test


Differentiate = Callable[[TaskBundle, int, Floats, Inputs], tuple[float, Floats]]
each_gradient = pytest.mark.parametrize(
    "differentiate",
    [pytest.param(step_graph, id="step-graph"), pytest.param(ort_training, id="ort-training", marks=WITH_ORT_TRAINING)],
)
each_engine = pytest.mark.parametrize(
    "engine_of",
    [
        pytest.param(StepGraphEngine, id="step-graph"),
        pytest.param(OrtTrainingEngine, id="ort-training", marks=WITH_ORT_TRAINING),
    ],
)


def cross_entropy(*labels: int, weights: tuple[float, ...] | None = None) -> Inputs:
    size = len(labels)
    return {
        "labels": np.array(labels),
        "weights": np.array(weights or (1 / size,) * size, np.float32),
        "gate": np.zeros(size, np.float32),
        "other": np.full(size, NEVER, np.float32),
        "bias": np.zeros(C, np.float32),
    }


MIXTURE: Inputs = {
    "labels": np.array([0, 1, 3, 1, 0]),
    "weights": np.array([0.5, 0.0, 0.1, 2.0, 0.25], np.float32),
    "gate": np.log(np.array([0.3, 0.9, 0.5, 0.1, 0.7], np.float32)),
    "other": np.array([-0.5, -1.0, -8.0, NEVER, -2.0], np.float32),
    "bias": np.array([0.3, -0.7, NEVER, 0.0], np.float32),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "terms",
    [
        pytest.param(cross_entropy(2), id="batch of one"),
        pytest.param(cross_entropy(1, 1, 1), id="one class"),
        pytest.param(cross_entropy(0, 1, 2, 3, 3, 0, 1), id="odd batch"),
        pytest.param(cross_entropy(3, 0, 2, weights=(0.5, 0.5, 0.0)), id="padding"),
        pytest.param(MIXTURE, id="mixture"),
    ],
)
@each_gradient
def test_loss_and_every_gradient_equal_torch_and_peft(
    built: Built, level: int, terms: Inputs, differentiate: Differentiate
) -> None:
    check_step(built, level, terms, differentiate)


@pytest.mark.parametrize("classes", [2, 9])
@each_gradient
def test_one_bundle_steps_with_any_number_of_classes(built: Built, classes: int, differentiate: Differentiate) -> None:
    other, level = with_classes(built, classes), 2
    bias = np.linspace(0.5, -0.5, classes, dtype=np.float32)
    check_step(other, level, {**MIXTURE, "labels": np.array([0, 1, classes - 1, 1, 0]), "bias": bias}, differentiate)
    samples, theta = random_samples(other, 3, seed=2), random_theta(other.bundle, level, 2)
    with torch.no_grad(), torch_expert(other, theta) as model:
        logits = model(**torch_inputs(samples, other.bundle.manifest.preprocessing)).logits.numpy()
    hidden = hidden_of(other, samples, level)
    (ours,) = run_graph(other.bundle, f"predict-{level}.onnx", ["logits"], hidden=hidden, theta=theta)
    assert relative_error(ours, logits) < TOLERANCE


def check_step(built: Built, level: int, terms: Inputs, differentiate: Differentiate) -> None:
    """Loss and gradients at random trainables equal torch + PEFT."""
    size = len(terms["labels"])
    samples, theta = random_samples(built, size, seed=level), random_theta(built.bundle, level, 1)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        labels, weights, gate, other, bias = (torch.from_numpy(terms[key]) for key in terms)
        own = torch.log_softmax(logits + bias, dim=1)[torch.arange(size), labels]
        return -(weights * torch.logaddexp(gate + own, other)).sum()

    loss, gradient = torch_step(built, theta, samples, loss_of)
    inputs = {"hidden": hidden_of(built, samples, level), **terms}
    our_loss, our_gradient = differentiate(built.bundle, level, theta, inputs)
    assert relative_error(our_loss, loss) < TOLERANCE
    ours = built.bundle.expert.split(our_gradient)
    tolerance = TOLERANCES.get(built.bundle.manifest.family, TOLERANCE)
    for name, part in built.bundle.expert.split(gradient).items():  # each tensor on its own scale
        assert relative_error(ours[name], part) < tolerance, name


@pytest.mark.parametrize("level", LEVELS)
@each_gradient
def test_masked_classes_get_no_gradient(vit: Built, level: int, differentiate: Differentiate) -> None:
    terms = {**cross_entropy(0, 2, 2, 0), "bias": np.array([0, NEVER, 0, NEVER], np.float32)}
    inputs = {"hidden": hidden_of(vit, random_samples(vit, 4, 3), level), **terms}
    _, gradient = differentiate(vit.bundle, level, random_theta(vit.bundle, level, 3), inputs)
    head = vit.bundle.expert.split(gradient)["classifier.weight"]
    assert np.all(np.abs(head[[1, 3]]) < 1e-30)  # negligible compared with AdamW's epsilon
    assert np.all(np.abs(head[[0, 2]]).max(axis=1) > 0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("micro_batch", "lean"), [(3, False), (8, False), (2, True)])
@each_engine
def test_twenty_steps_equal_torchs_adamw_over_the_whole_model(
    built: Built, level: int, micro_batch: int, lean: bool, engine_of: Callable[..., Engine]
) -> None:
    steps, bundle = twenty_steps(built, level), built.bundle
    engine = engine_of(bundle, threads=1, memory_plans={level: MemoryPlan(micro_batch, lean)})
    engine.load(level)
    engine.set(steps.theta, Training(epochs=1, learning_rate=RATE, weight_decay=DECAY))
    hidden = hidden_of(built, steps.samples, level)
    losses = []
    for number, b in enumerate(steps.batches):
        losses.append(engine.step(Batch.cross_entropy(hidden[b], steps.labels[b], C)))
        if number in (0, 9, 19):  # opening the graphs again takes most of the time
            engine.release()
    assert np.abs(engine.get() - steps.trained).max() < 1e-4
    assert losses == pytest.approx(steps.losses, rel=1e-4)
    assert relative_error(engine.predict(hidden), steps.logits) < 1e-3


@dataclass(frozen=True)
class Steps:
    """Twenty batches, and what torch's AdamW makes of them."""

    samples: NDArray[Any]
    labels: NDArray[np.int64]
    batches: list[NDArray[np.int64]]
    theta: Floats
    trained: Floats
    losses: list[float]
    logits: Floats


KNOWN: dict[tuple[str, int], Steps] = {}  # by bundle and level: torch takes most of the time of these tests


def twenty_steps(built: Built, level: int) -> Steps:
    key = built.bundle.sha256, level
    if key not in KNOWN:
        KNOWN[key] = train_with_torch(built, level)
    return KNOWN[key]


def train_with_torch(built: Built, level: int) -> Steps:
    bundle, manifest = built.bundle, built.bundle.manifest
    rng = np.random.default_rng(5)
    samples, labels = random_samples(built, 24, seed=5), rng.integers(0, C, 24)
    batches = [rng.choice(24, size, replace=False) for size in (8, 7, 4, 1) * 5]
    theta = random_theta(bundle, level, 4)
    with torch_expert(built, theta) as model:
        head = [p for name, p in trainables(model).items() if "classifier" in name]
        lora = [p for name, p in trainables(model).items() if "classifier" not in name]
        optimizer = torch.optim.AdamW(
            [{"params": head, "weight_decay": 0.0}, {"params": lora, "weight_decay": DECAY}], lr=RATE
        )
        inputs, targets, theirs = torch_inputs(samples, manifest.preprocessing), torch.from_numpy(labels), []
        for batch in batches:
            optimizer.zero_grad()
            chosen = {name: tensor[batch] for name, tensor in inputs.items()}
            loss = torch.nn.functional.cross_entropy(model(**chosen).logits, targets[batch])
            loss.backward()
            for parameter in head:  # transformers' DINOv2 classifier also reads the mean patch token
                parameter.grad[..., 32:] = 0
            optimizer.step()
            theirs.append(loss.item())
        state = {name: p.detach().numpy() for name, p in trainables(model).items()}
        logits = model(**inputs).logits.detach().numpy()
        trained = bundle.expert.join(from_peft(manifest.peft, state))
    assert np.abs(trained - theta).max() > 10 * RATE  # training has changed them
    return Steps(samples, labels, batches, theta, trained, theirs, logits)


def test_a_callers_own_adamw_on_the_gradient_takes_the_same_steps(vit: Built) -> None:
    theta, training = random_theta(vit.bundle, 2, 0), Training(epochs=1, learning_rate=1e-2)
    batch = Batch.cross_entropy(hidden_of(vit, random_samples(vit, 5, 1), 2), np.array([0, 1, 2, 3, 0]), C)
    engine, stepped = StepGraphEngine(vit.bundle, threads=1), StepGraphEngine(vit.bundle, threads=1)
    optimizer = AdamW(training.learning_rate, expert_decay(vit.bundle.expert, theta.size, training.weight_decay))
    engine.load(2)
    stepped.load(2)
    stepped.set(theta, training)
    for _ in range(3):
        engine.set(theta)
        loss, gradient = engine.gradient(batch)
        assert np.array_equal(engine.get(), theta)
        theta = optimizer.step(theta, gradient)
        assert stepped.step(batch) == loss
        assert np.array_equal(stepped.get(), theta)


def test_features_are_what_the_head_reads(vit: Built) -> None:
    theta, hidden = random_theta(vit.bundle, 2, 0), hidden_of(vit, random_samples(vit, 3, 1), 2)
    engine = StepGraphEngine(vit.bundle, threads=1)
    engine.load(2)
    engine.set(theta)
    head = vit.bundle.expert.split(theta)
    logits = engine.features(hidden) @ head["classifier.weight"].T + head["classifier.bias"]
    assert relative_error(logits, engine.predict(hidden)) < TOLERANCE


@each_engine
def test_every_training_starts_with_a_new_optimizer(vit: Built, engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(vit.bundle, threads=1)
    batch = Batch.cross_entropy(hidden_of(vit, random_samples(vit, 4, 1), 2), np.array([0, 1, 2, 3]), C)
    theta = random_theta(vit.bundle, 2, 0)
    ends = []
    for _ in range(2):
        engine.load(2)
        engine.set(theta, Training(epochs=1, learning_rate=1e-2))
        for _ in range(3):
            engine.step(batch)
        ends.append(engine.get())
    assert np.array_equal(*ends)
    assert not np.array_equal(ends[0], theta)


@each_engine
def test_an_engine_without_an_optimizer_refuses_to_train(vit: Built, engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(vit.bundle, threads=1)
    engine.load(1)
    engine.set(random_theta(vit.bundle, 1, 0), Training(epochs=1, learning_rate=1e-3))
    engine.load(1)  # drops the optimizer
    with pytest.raises(RuntimeError, match="optimizer"):
        engine.step(Batch(*(np.zeros(1, np.float32),) * 5))  # type: ignore[arg-type]


@with_ort_training
def test_auto_selects_onnxruntime_training_if_the_bundle_has_its_artifacts(
    vit: Built, vit_folder: Path, tmp_path: Path
) -> None:
    assert open_engine("auto", vit.bundle, 1).name == "ort-training"
    assert open_engine("step-graph", vit.bundle, 1).name == "step-graph"
    int8 = build(vit_folder, tmp_path / "int8", precision="int8").bundle
    assert open_engine("auto", int8, 1).name == "step-graph"
    with pytest.raises(ConfigError, match=r"has no onnxruntime-training artifacts; build it with .* --ort-training"):
        open_engine("ort-training", int8, 1)


@with_ort_training
def test_a_device_trains_the_same_in_both_stages_with_either_engine(vit: Built, photos: Path, tmp_path: Path) -> None:
    published, updates = initial_globals(vit.bundle, 1), []
    for engine_of in (StepGraphEngine, OrtTrainingEngine):
        context = training_context(vit.bundle, photos, tmp_path / engine_of.__name__)
        context = replace(context, engine=engine_of(vit.bundle, threads=1))
        trained = [
            train(context, announced_round(stage), published).delta
            for stage, train in ((Stage.GLOBAL, train_global), (Stage.PERSONAL, train_personal))
        ]
        assert all(delta is not None and delta.any() for delta in trained)
        updates.append(np.concatenate([delta for delta in trained if delta is not None]))
    assert np.abs(updates[0] - updates[1]).max() < 1e-4


@with_ort_training
def test_damaged_artifacts_are_one_clear_error(vit: Built, tmp_path: Path) -> None:
    shutil.copytree(vit.bundle.root, tmp_path / "bundle")
    (tmp_path / "bundle" / "ort-training-1.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="onnxruntime-training cannot load level 1"):
        TrainingSession(TaskBundle.load(tmp_path / "bundle"), 1, random_theta(vit.bundle, 1, 0), 1e-3, threads=1)


@with_ort_training
def test_writing_artifacts_is_silent_and_changes_no_file_in_the_working_directory(
    vit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temp.onnx").write_text("user data")  # onnxruntime-training would delete it
    build(vit_folder, Path("bundle"), levels=1)
    assert (tmp_path / "temp.onnx").read_text() == "user data"
    assert {path.name for path in tmp_path.iterdir()} == {"temp.onnx", "bundle"}
    assert "onnxruntime" not in capfd.readouterr().err


@with_ort_training
def test_artifacts_for_int8_are_refused(vit: Built, tmp_path: Path) -> None:
    steps = build_bundle(vit.source, 1, vit.bundle.manifest.lora, tmp_path / "b", 0, "int8", ort_training=True)
    with pytest.raises(ConfigError, match="needs --precision fp32"):
        list(steps)


@pytest.mark.parametrize(
    ("tokens", "hidden", "level", "cpu", "cuda"),
    [
        pytest.param(197, 768, 1, 55, 887, id="level 1 multiplies class tokens only, so memory is the limit"),
        pytest.param(197, 768, 2, 2, 186, id="394 rows"),
        pytest.param(101, 384, 2, 4, 728, id="404 rows"),
        pytest.param(197, 768, 12, 1, 20, id="one sample takes 102 MB"),
        pytest.param(1025, 384, 2, 1, 71, id="never less than one sample"),
    ],
)
def test_the_default_micro_batch_is_large_enough_for_products_and_no_larger(
    tokens: int, hidden: int, level: int, cpu: int, cuda: int
) -> None:
    dims = Dims(tokens=tokens, hidden=hidden, feature=hidden, blocks=12)
    assert [default_micro_batch(dims, level, provider) for provider in ("cpu", "cuda")] == [cpu, cuda]


def test_a_step_graph_engine_needs_only_a_bundle(vit: Built) -> None:
    engine = StepGraphEngine(vit.bundle)
    engine.load(1)
    engine.set(random_theta(vit.bundle, 1, 0), Training(epochs=1, learning_rate=1e-2))
    batch = Batch.cross_entropy(hidden_of(vit, random_samples(vit, 4, 1), 1), np.array([0, 1, 2, 3]), C)
    first = engine.step(batch)
    assert engine.step(batch) < first


@without_ort_training
def test_auto_selects_step_graphs_without_onnxruntime_training(vit: Built) -> None:
    assert open_engine("auto", vit.bundle, 1).name == "step-graph"
    with pytest.raises(ConfigError, match="--engine ort-training needs onnxruntime-training"):
        open_engine("ort-training", vit.bundle, 1)
