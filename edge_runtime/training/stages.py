"""What a device computes in each stage of a run. A stage takes the announced round and the global vectors, and returns
what goes back to the server; nothing here talks to anybody."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import Device
from edge_runtime.training.loop import Targets, predict_log, train
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.class_means import class_mean_head
from fedfmsl.algorithms.mixture import accuracy
from fedfmsl.protocol.messages import Round, Stage
from fedfmsl.protocol.tensors import Tensors


@dataclass(frozen=True)
class Globals:
    """The global expert (P,), the class-mean expert that stage 1 started from (P₁,), the gate adapter (G,)."""

    expert: Vector
    start: Vector
    gate: Vector


@dataclass(frozen=True)
class Outcome:
    """What a stage leaves for the server: `tensors` as they are, or a `delta`, the trained values less the global ones,
    which is still to be made into tensors (see `edge_runtime.training.updates`): (P,) of an expert at `level`, the level it was
    trained at, or (G,) of the gate. `samples` weighs it."""

    tensors: Tensors = field(default_factory=dict)
    delta: Vector | None = None
    samples: int = 0
    level: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, list[int]] = field(default_factory=dict)


Work = Callable[[Device, Round, Globals], Outcome]


def statistics(device: Device, task: Round, _: Globals) -> Outcome:
    """What the head of class means is made of."""
    return Outcome(class_sums(device, task.level), samples=len(device.slices.train))


def class_sums(device: Device, level: int) -> dict[str, Vector]:
    """Class sums and counts of the frozen feature over the training slice, and the sum of the features' norms."""
    images = device.slices.train
    pooled = device.cache.pooled(images, level).astype(np.float64)
    one_hot = np.eye(device.classes)[labels_of(images)]
    return {
        "class_sums": (one_hot.T @ pooled).astype(np.float32),
        "class_counts": one_hot.sum(axis=0).astype(np.float32),
        "norm_sum": np.array([np.linalg.norm(pooled, axis=1).sum()], np.float32),
    }


def class_mean_expert(device: Device) -> Vector:
    """An expert of the bundle's highest level (P,) that has trained nothing but the head of this device's own class
    means."""
    own = class_sums(device, 1)
    theta = device.bundle.initial()[0]
    head = class_mean_head(own["class_sums"], own["class_counts"], float(own["norm_sum"][0]))
    theta[: head.size] = head
    return theta


def train_global(device: Device, task: Round, given: Globals) -> Outcome:
    """Stage 1: local epochs of cross-entropy over the classes this device holds, at its level."""
    slices, engine, layout = device.slices, device.engine, device.bundle.expert
    level = min(task.level, device.level_cap)
    theta = given.expert[: layout.size(level)]
    engine.load(level)
    engine.set(theta, task.training)
    held_out = predict_log(engine, device.hidden(slices.held_out, given.expert, level), device.mask)
    hidden = device.hidden(slices.train, given.expert, level)
    targets = Targets.cross_entropy(labels_of(slices.train))
    loss = train(engine, hidden, targets, device.mask, task.training, seed_of(device, task), device.report)
    metrics = {"held_out_global": accuracy(held_out, labels_of(slices.held_out)), "loss": loss}
    return Outcome(delta=engine.get() - theta, samples=len(slices.train), level=level, metrics=metrics)


def seed_of(device: Device, task: Round) -> list[int]:
    """One random stream for each (seed, device, stage, round of the stage): a repeated round repeats its shuffles."""
    return [task.training.seed, *device.name.encode(), list(Stage).index(task.stage), task.index]
