"""MoFM on a device that does not hold every class: real photos, real ONNX Runtime."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built, random_theta, run_graph
from support.samples import CLASSES
from support.training_contexts import SAL, announced_round, training_context

from edge_runtime.data.inputs import reader_of
from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.evaluation import evaluate, predict_models
from edge_runtime.training.local_expert import LocalExpert, gate_examples, train_personal
from edge_runtime.training.mixture import (
    ExpertOutputs,
    dropped_class_log_p,
    expert_outputs,
    global_temperature,
    tempered,
)
from edge_runtime.training.model import make_personal_model
from edge_runtime.training.stages import Globals, class_mean_expert
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.algorithms.calibration import fit_temperature
from fedfmsl.algorithms.mixture import NOVEL_RATE, accuracy, label_log_p, log_softmax
from fedfmsl.protocol.messages import Stage

NOVEL = CLASSES.index("lemon")


@pytest.fixture
def context(vit: Built, photos: Path, tmp_path: Path) -> TrainingContext:
    """A device without photos of the class NOVEL."""
    own = shutil.copytree(photos, tmp_path / "photos", ignore=shutil.ignore_patterns(CLASSES[NOVEL]))
    return training_context(vit.bundle, own, tmp_path / "state")


@pytest.fixture
def published(vit: Built) -> Globals:
    theta = random_theta(vit.bundle, 1, seed=1)
    return Globals(theta, theta, vit.bundle.initial()[1])


@pytest.fixture
def everything(vit: Built, photos: Path, tmp_path: Path) -> TrainingContext:
    """Another device, with photos of all classes."""
    return training_context(vit.bundle, photos, tmp_path / "other")


def outputs_of(context: TrainingContext, published: Globals, seed: int = 2) -> ExpertOutputs:
    theta = random_theta(context.bundle, 1, seed)
    return expert_outputs(context, context.splits.held_out, published, 1.0, theta, level=1)


def test_an_untrained_gate_leaves_the_probability_of_novel_classes_to_the_global_expert(
    context: TrainingContext, everything: TrainingContext
) -> None:
    samples, knows = everything.splits.train, class_mean_expert(everything)[: context.bundle.expert.size(1)]
    published = Globals(knows, knows, context.bundle.initial()[1])
    models = predict_models(context, announced_round(Stage.EVALUATE), published, samples)
    temperature = global_temperature(context, published)
    outputs = expert_outputs(context, samples, published, temperature, published.expert, 1)
    posterior = log_softmax(outputs.global_logits + context.biases.prior)
    assert np.allclose(models["mofm"][:, NOVEL], posterior[:, NOVEL], atol=0.05)  # fp16 hidden states
    certain = posterior[:, NOVEL] > np.log(0.55)
    assert certain.any()
    assert (models["mofm"][certain].argmax(axis=1) == NOVEL).all()
    assert (models["local_expert"][:, NOVEL] < -1e3).all()


def test_gate_examples_are_every_sample_with_and_without_its_class(
    context: TrainingContext, published: Globals
) -> None:
    labels, outputs = labels_of(context.splits.held_out), outputs_of(context, published)
    examples, size = gate_examples(context.class_counts, outputs, labels), len(labels)
    assert len(examples.features) == 2 * size
    assert examples.weights.sum() == pytest.approx(1)
    assert examples.weights[:size].sum() == pytest.approx(1 - NOVEL_RATE)
    mixture = outputs.mixture(context, published.gate, context.biases)
    assert np.allclose(log_softmax(examples.offset[:size]), mixture.log_gate, atol=1e-5)
    for column, log_p in enumerate((mixture.global_log_p, mixture.local_log_p)):
        assert np.allclose(examples.expert_log_p[:size, column], label_log_p(log_p, labels), atol=1e-5)
    assert (examples.expert_log_p[size:, 1] < -1e3).all()  # the local expert cannot know a dropped class
    assert (examples.expert_log_p[size:, 0] > -1e3).all()


def test_class_dropout_moves_the_gate_towards_the_global_expert(context: TrainingContext, published: Globals) -> None:
    labels, outputs = labels_of(context.splits.held_out), outputs_of(context, published)
    examples, size = gate_examples(context.class_counts, outputs, labels), len(labels)
    dropped = replace(
        examples, **{name: getattr(examples, name)[size:] for name in ("features", "offset", "expert_log_p", "weights")}
    )
    gate = context.gate.train(published.gate, dropped)
    before, after = (context.gate.log_weights(g, dropped.features, dropped.offset) for g in (published.gate, gate))
    assert (after[:, 0] > before[:, 0]).all()


def test_a_trained_gate_has_a_higher_likelihood_of_its_examples(context: TrainingContext, published: Globals) -> None:
    outputs = outputs_of(context, published)
    examples = gate_examples(context.class_counts, outputs, labels_of(context.splits.held_out))

    def loss(gate: Floats) -> float:
        log_gate = context.gate.log_weights(gate, examples.features, examples.offset)
        return float(-examples.weights @ np.logaddexp.reduce(log_gate + examples.expert_log_p, axis=1))

    assert loss(context.gate.train(published.gate, examples)) < loss(published.gate)


def test_a_device_estimates_its_accuracy_on_novel_classes_from_dropped_ones(
    context: TrainingContext, published: Globals
) -> None:
    samples, labels = context.splits.held_out, labels_of(context.splits.held_out)
    outputs = outputs_of(context, published)
    dropped = dropped_class_log_p(context, published.gate, outputs, labels)
    kept = outputs.mixture(context, published.gate, context.biases).log_p
    assert dropped.shape == kept.shape == (len(samples), context.classes)
    assert np.allclose(np.exp(dropped).sum(axis=1), 1, atol=1e-5)
    assert label_log_p(dropped, labels).mean() < label_log_p(kept, labels).mean()
    result = train_personal(context, announced_round(Stage.PERSONAL), published)
    assert 0 <= result.metrics["held_out_novel"] <= 1
    assert 0 <= evaluate(context, announced_round(Stage.EVALUATE), published).metrics["mofm_novel_estimate"] <= 1


def test_a_device_with_one_class_has_no_estimate_for_novel_classes(
    vit: Built, photos: Path, tmp_path: Path, published: Globals
) -> None:
    ignored = shutil.ignore_patterns(*CLASSES[1:])
    context = training_context(vit.bundle, shutil.copytree(photos, tmp_path / "one", ignore=ignored), tmp_path / "s")
    result = train_personal(context, announced_round(Stage.PERSONAL), published)
    assert "held_out_novel" not in result.metrics
    assert result.delta is not None and np.isfinite(result.delta).all()
    metrics = evaluate(context, announced_round(Stage.EVALUATE), published).metrics
    assert "mofm_novel_estimate" not in metrics
    assert {"mofm", "global", "local_expert"} <= metrics.keys()


def test_the_global_expert_is_tempered_on_the_held_out_split(context: TrainingContext, published: Globals) -> None:
    hot = replace(published, expert=published.expert.copy())
    hot.expert[: context.bundle.expert.size(0)] *= 30
    labels, no_bias = labels_of(context.splits.held_out), np.zeros(context.classes, np.float32)
    log_p = context.log_p(context.splits.held_out, hot.expert, no_bias)
    temperature = global_temperature(context, hot)
    assert temperature == fit_temperature(log_p, labels)
    cooled = tempered(context, hot.expert, temperature)
    after = context.log_p(context.splits.held_out, cooled, no_bias)
    assert np.allclose(after, log_softmax(log_p / np.float32(temperature)), atol=1e-3)
    assert accuracy(after, labels) == accuracy(log_p, labels)
    head = context.bundle.expert.size(0)
    assert np.array_equal(cooled[head:], hot.expert[head:])


@pytest.mark.parametrize("stage", [Stage.STATISTICS, Stage.GLOBAL, Stage.PERSONAL])
def test_the_saved_model_equals_the_mixture_and_knows_its_prior(
    context: TrainingContext, published: Globals, stage: Stage
) -> None:
    """Before there is a global expert, nothing is known of novel classes."""
    empty = np.empty(0, np.float32)
    globals_ = Globals(empty, empty, empty) if stage is Stage.STATISTICS else published
    round_ = announced_round(stage).model_copy(update={"sal": SAL})
    if stage is Stage.PERSONAL:
        train_personal(context, round_, globals_)
    model, samples = make_personal_model(context, round_, globals_), context.splits.train
    probabilities, gate = run_graph(
        context.bundle,
        f"personal-{model.header.level}.onnx",
        ["probabilities", "gate"],
        **reader_of(context.bundle).batch([sample.path for sample in samples]),
        **model.inputs,
    )
    assert model.header.held == tuple(index != NOVEL for index in range(len(CLASSES)))
    assert sum(model.header.prior) == pytest.approx(1, abs=1e-5)
    if stage is Stage.STATISTICS:
        assert model.header.prior[NOVEL] == 0
        assert probabilities[:, NOVEL].max() < 1e-6
        return
    assert model.header.prior[NOVEL] == pytest.approx(NOVEL_RATE)
    temperature = global_temperature(context, published)
    start = LocalExpert.from_global(context, tempered(context, published.expert, temperature), SAL)
    local = LocalExpert.load(context, "s") or start
    precise = context.precise()
    outputs = expert_outputs(precise, samples, published, temperature, local.best, 1)
    mixture = outputs.mixture(context, globals_.gate, context.biases)
    assert np.allclose(gate, np.exp(mixture.log_gate), atol=1e-5)
    assert np.allclose(probabilities, np.exp(model.calibrated(mixture.log_p)), atol=1e-5)
