"""The stages `baseline` (training without a federation) and `evaluate` (accuracy of every model on the test split)."""

from __future__ import annotations

import json

import numpy as np
from pydantic import BaseModel

from edge_runtime.data.samples import labels_of
from edge_runtime.training.adoption import DivergedError
from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.local_expert import LocalExpert
from edge_runtime.training.loop import Targets, predict_log_p, train
from edge_runtime.training.mixture import (
    ExpertOutputs,
    Mixture,
    dropped_class_log_p,
    expert_outputs,
    global_temperature,
    tempered,
)
from edge_runtime.training.model import make_personal_model, model_log_p, served_model
from edge_runtime.training.stages import Globals, StageResult, class_mean_expert, shuffle_seed
from edge_runtime.training.stored_model import Served
from edge_runtime.training.tensor_file import read_tensors
from fedfmsl.algorithms.arrays import Floats, Labels, Vector
from fedfmsl.algorithms.mixture import accuracy, gate_statistics, label_log_p, log_softmax, nll
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import shown
from fedfmsl.protocol.messages import Round
from fedfmsl.protocol.tensors import pack


class BaselineHeader(BaseModel):
    """Header of the baseline's file, beside the tensor `theta` (P,)."""

    session: str
    task: str
    level: int


def train_baseline(context: TrainingContext, round_: Round, _: Globals) -> StageResult:
    """Trains from the device's own class means, with the run's number of epochs and SAL settings.

    Saves the expert with the highest held-out accuracy, at equal accuracy the one with the highest likelihood. The
    untrained start is a candidate.
    """
    splits, engine, layout = context.splits, context.engine, context.bundle.expert
    theta = class_mean_expert(context)
    sal = context.capped(round_.sal)
    state = sal.start()
    best: tuple[tuple[float, float], Vector] | None = None
    for repetition in range(round_.repetitions + 1):
        level, size = state.level, layout.size(state.level)
        engine.load(level)
        engine.set(theta[:size], round_.training)
        if repetition:
            hidden = context.cache.frozen(splits.train, level)
            targets = Targets.cross_entropy(labels_of(splits.train))
            seed = [*shuffle_seed(context, round_), repetition]
            train(engine, hidden, targets, context.class_mask, round_.training, seed, context.report)
            theta[:size] = engine.get()
        held_out = predict_log_p(engine, context.cache.frozen(splits.held_out, level), context.class_mask)
        labels = labels_of(splits.held_out)
        score = accuracy(held_out, labels), float(label_log_p(held_out, labels).mean())
        if best is None or score > best[0]:
            best = score, theta[:size].copy()
        if repetition:
            state = sal.observe(state, score[0])
    assert best is not None
    header = BaselineHeader(session=round_.session, task=context.bundle.task.sha256, level=context.level_of(best[1]))
    write_atomically(context.store.baseline, pack(header, {"theta": best[1]}))
    metrics = {"held_out_local_only": best[0][0]}
    return StageResult(samples=len(splits.train), level=header.level, metrics=metrics)


def predict_models(context: TrainingContext, round_: Round, published: Globals, samples: Samples) -> dict[str, Floats]:
    """Class log-probabilities (n, C) of each of the device's models for any n samples, by the model's name.

    `start` is the head of class means, `global` the global expert, `global_prior` that with the device's class prior.
    `local_expert` and `mofm` are the device's own; `local_only` exists in a run with a baseline. Reads no labels, so
    the trial uses it for samples of other devices too.
    """
    return _predict(context, round_, published, samples)[0]


def evaluate(context: TrainingContext, round_: Round, published: Globals) -> StageResult:
    """Accuracy of every model on the test split, which no other stage reads. Also writes results.json, which has the
    accuracy of the model that predictions use as well: it may be an earlier one.

    The accuracy on novel classes is an estimate by class dropout on the held-out split.
    """
    samples, held_out = context.splits.test, context.splits.held_out
    labels = labels_of(samples)
    try:
        model = make_personal_model(context, round_, published)
    except DivergedError:  # the results say so, with accuracies of chance
        model = None
    models, mixture = _predict(context, round_, published, samples)
    weight, entropy = gate_statistics(mixture.log_gate) if samples else (0.0, 0.0)
    metrics = {name: accuracy(log_p, labels) for name, log_p in models.items()}
    expert, outputs = _outputs(context, round_, published, context, held_out)
    dropped = dropped_class_log_p(context, published.gate, outputs, labels_of(held_out))
    if len(dropped):
        metrics["mofm_novel_estimate"] = accuracy(dropped, labels_of(held_out))
    counts = {"test": _per_class(context, labels)}
    for name in ("start", "global"):
        counts[name] = _per_class(context, labels[models[name].argmax(axis=1) == labels])
    calibrated = model.calibrated(models["mofm"]) if model else models["mofm"]
    probabilities = {shown(i.path): p.tolist() for i, p in zip(samples, np.exp(calibrated), strict=True)}
    results = {"run": round_.run, "accuracy": metrics, "probabilities": probabilities}
    served = served_model(context, model)
    if served is not None:
        log_p = models["mofm"] if served is model else model_log_p(context, served, samples)
        used, right = served.header, accuracy(log_p, labels)
        measured = Served(session=used.session, round=used.round, samples=len(samples), accuracy=right)
        results["served"] = measured.model_dump()
    write_atomically(context.store.results, json.dumps(results).encode())
    return StageResult(
        samples=len(samples),
        level=expert.best_level,
        metrics={
            **metrics,
            "mean_local_weight": weight,
            "gate_entropy": entropy,
            "mofm_nll": nll(calibrated, labels),
            "mofm_nll_uncalibrated": nll(models["mofm"], labels),
        },
        counts=counts,
        model=model,
    )


def _predict(
    context: TrainingContext, round_: Round, published: Globals, samples: Samples
) -> tuple[dict[str, Floats], Mixture]:
    precise, no_bias = context.precise(), np.zeros(context.classes, np.float32)
    outputs = _outputs(context, round_, published, precise, samples)[1]
    mixture = outputs.mixture(context, published.gate, context.biases)
    models = {
        "start": precise.log_p(samples, published.start, no_bias),
        "global": log_softmax(outputs.global_logits),
        "global_prior": log_softmax(outputs.global_logits + context.biases.prior),
        "local_expert": mixture.local_log_p,
        "mofm": mixture.log_p,
    }
    baseline = _load_baseline(context, round_.session)
    if baseline is not None:
        models["local_only"] = precise.log_p(samples, baseline, context.class_mask)
    return models, mixture


def _outputs(
    context: TrainingContext, round_: Round, published: Globals, states: TrainingContext, samples: Samples
) -> tuple[LocalExpert, ExpertOutputs]:
    """The local expert, and both experts' outputs with the hidden states that `states` has. Before stage 2 the local
    expert is made from the global one."""
    temperature = global_temperature(context, published)
    expert = LocalExpert.load(context, round_.session) or LocalExpert.from_global(
        context, tempered(context, published.expert, temperature), round_.sal
    )
    return expert, expert_outputs(states, samples, published, temperature, expert.best, expert.best_level)


def _per_class(context: TrainingContext, labels: Labels) -> list[int]:
    counts: list[int] = np.bincount(labels, minlength=context.classes).tolist()
    return counts


def _load_baseline(context: TrainingContext, session: str) -> Vector | None:
    found = read_tensors(context.store.baseline, BaselineHeader, ["theta"])
    if found is None:
        return None
    header, (theta,) = found
    return theta if (header.session, header.task) == (session, context.bundle.task.sha256) else None
