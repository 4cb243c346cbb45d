"""What a method is compared with, and how well each model does on a device's test slice."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import Device
from edge_runtime.training.local_expert import LocalExpert, mixture
from edge_runtime.training.loop import Targets, predict_log, train
from edge_runtime.training.model import personal_model
from edge_runtime.training.stages import Globals, Outcome, class_mean_expert, seed_of
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.mixture import accuracy, gate_statistics, label_log_p, nll
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import Round
from fedfmsl.protocol.tensors import pack, unpack


class _Header(BaseModel):
    session: str
    level: int


def train_alone(device: Device, task: Round, _: Globals) -> Outcome:
    """The baseline without a federation: own class means, then the same epochs and rule of levels; the best on the
    held-out slice is kept."""
    slices, engine, layout = device.slices, device.engine, device.bundle.expert
    theta = class_mean_expert(device)
    rule = device.within_cap(task.sal)
    sal = rule.start()
    best: tuple[tuple[float, float], Vector] | None = None
    for repetition in range(task.repetitions + 1):
        level, size = sal.level, layout.size(sal.level)
        engine.load(level)
        engine.set(theta[:size], task.training)
        if repetition:  # the start is a candidate too
            hidden = device.cache.frozen(slices.train, level)
            targets = Targets.cross_entropy(labels_of(slices.train))
            seed = [*seed_of(device, task), repetition]
            train(engine, hidden, targets, device.mask, task.training, seed, device.report)
            theta[:size] = engine.get()
        held_out = predict_log(engine, device.cache.frozen(slices.held_out, level), device.mask)
        labels = labels_of(slices.held_out)
        score = accuracy(held_out, labels), float(label_log_p(held_out, labels).mean())
        if best is None or score > best[0]:
            best = score, theta[:size].copy()
        if repetition:
            sal = rule.observe(sal, score[0])
    assert best is not None
    header = _Header(session=task.session, level=device.level_of(best[1]))
    write_atomically(device.store.baseline, pack(header, {"theta": best[1]}))
    return Outcome(samples=len(slices.train), level=header.level, metrics={"held_out_local_only": best[0][0]})


def evaluate(device: Device, task: Round, given: Globals) -> Outcome:
    """Accuracy of every model on the test slice, which nothing before has looked at."""
    images = device.slices.test
    model = personal_model(device, task, given)
    # fp32 states, so that these are the very probabilities that the personalized model gives
    device = replace(device, cache=device.cache.precise())
    labels = labels_of(images)
    nothing = np.zeros_like(device.prior)
    expert = LocalExpert.load(device, task.session) or LocalExpert.from_global(device, given.expert, task.sal)
    seen = mixture(device, images, given, expert.best, expert.best_level)
    models = {
        "start": device.log_p(images, given.start, nothing),
        "global": device.log_p(images, given.expert, nothing),
        "global_prior": seen.global_log_p,
        "local_expert": seen.local_log_p,
        "mofm": seen.log_p,
    }
    alone = _load_alone(device, task.session)
    if alone is not None:
        models["local_only"] = device.log_p(images, alone, device.mask)
    weight, entropy = gate_statistics(seen.log_gate) if len(images) else (0.0, 0.0)
    metrics = {name: accuracy(log_p, labels) for name, log_p in models.items()}
    counts = {"test": _per_class(device, labels)}
    for name in ("start", "global"):
        counts[name] = _per_class(device, labels[models[name].argmax(axis=1) == labels])
    calibrated = model.calibrated(seen.log_p)
    probabilities = {str(i.path): p.tolist() for i, p in zip(images, np.exp(calibrated), strict=True)}
    results = {"run": task.run, "accuracy": metrics, "probabilities": probabilities}
    write_atomically(device.store.results, json.dumps(results).encode())
    return Outcome(
        samples=len(images),
        level=expert.best_level,
        metrics={
            **metrics,
            "mean_local_weight": weight,
            "gate_entropy": entropy,
            "mofm_nll": nll(calibrated, labels),
            "mofm_nll_uncalibrated": nll(seen.log_p, labels),
        },
        counts=counts,
    )


def _per_class(device: Device, labels: NDArray[np.int64]) -> list[int]:
    counts: list[int] = np.bincount(labels, minlength=device.classes).tolist()
    return counts


def _load_alone(device: Device, session: str) -> Vector | None:
    try:
        header, tensors = unpack(device.store.baseline.read_bytes(), _Header)
        return np.asarray(tensors["theta"], np.float32) if header.session == session else None
    except (OSError, MessageError, KeyError):
        return None
