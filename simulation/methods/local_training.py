"""Local training for any method: AdamW on some of the trainables, with or without a proximal term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.samples import labels_of
from edge_runtime.engines.base import Batch, expert_decay
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import Floats, Labels, Vector
from fedfmsl.protocol.layout import HEAD, Layout, Slot
from fedfmsl.protocol.messages import Training

Steps = Sequence[NDArray[np.int64]]  # for each step, the indices of its samples
Choose = Callable[[Slot], bool]


def is_head(slot: Slot) -> bool:
    return slot.part == HEAD


def is_lora_a(slot: Slot) -> bool:
    return slot.name.endswith("lora_A.weight")


def is_lora_b(slot: Slot) -> bool:
    return slot.name.endswith("lora_B.weight")


def everything(_: Slot) -> bool:
    return True


def mask(layout: Layout, size: int, choose: Choose) -> Vector:
    """(P,) with P = `size`: 1 for the values of the chosen tensors, else 0."""
    chosen = np.zeros(size, np.float32)
    for slot in layout.slots:
        if slot.end <= size and choose(slot):
            chosen[slot.offset : slot.end] = 1.0
    return chosen


@dataclass(frozen=True)
class Proximal:
    """The term weight/2 · ‖θ - center‖² of the loss, with `center` (P,)."""

    center: Vector
    weight: float


def shuffled_steps(samples: int, training: Training, seed: Sequence[int]) -> Steps:
    """The steps of `training.epochs` shuffled epochs, as `edge_runtime.training.loop.train` takes them."""
    rng = np.random.default_rng(seed)
    count = -(-samples // training.batch_size)
    return [step for _ in range(training.epochs) for step in np.array_split(rng.permutation(samples), count)]


def halves(steps: Steps, index: int) -> tuple[Steps, Steps]:
    """Divides the steps of round `index` between two phases, so that a method with two phases takes as many steps as
    one with one phase. An odd step is the second phase's in even rounds, and the first's in odd ones (ours)."""
    middle = (len(steps) + index % 2) // 2
    return steps[:middle], steps[middle:]


def train_steps(
    context: TrainingContext,
    samples: Samples,
    theta: Vector,
    steps: Steps,
    training: Training,
    trained: Vector,
    proximal: Proximal | None = None,
    restricted: bool = False,
) -> Vector:
    """The trainables (P,) after the steps on the cross-entropy, from `theta` (P,) at its level.

    `trained` (P,): 1 for trainables that change, 0 for frozen ones. `restricted`: see `cross_entropy`. The optimizer is
    new, as in every stage.
    """
    engine, level = step_graphs(context), context.level_of(theta)
    engine.load(level)
    hidden, labels = context.cache.frozen(samples, level), labels_of(samples)
    optimizer = AdamW(
        training.learning_rate, trained * expert_decay(context.bundle.expert, theta.size, training.weight_decay)
    )
    for chosen in steps:
        engine.set(theta)
        _, gradient = engine.gradient(cross_entropy(context, hidden.batch(chosen), labels[chosen], restricted))
        if proximal is not None:
            gradient = gradient + np.float32(proximal.weight) * (theta - proximal.center)
        theta = optimizer.step(theta, gradient * trained)
    return theta


def cross_entropy(context: TrainingContext, hidden: Floats, labels: Labels, restricted: bool) -> Batch:
    """A batch with the cross-entropy over all classes. `restricted`: over the held classes, so that the head's rows of
    novel classes do not change (FedRS, Li & Zhan, KDD 2021).

    The papers use all classes. Each method has the setting that was better on held-out samples of which 10% are novel
    (groceries, α = 0.5, seed 0, level 1, 17 rounds). So were λ of Ditto and μ of FedProx chosen.
    """
    batch = Batch.cross_entropy(hidden, labels, context.classes)
    return replace(batch, bias=context.class_mask) if restricted else batch


def log_p(context: TrainingContext, samples: Samples, theta: Vector) -> Floats:
    """Class log-probabilities (n, C) of the softmax over all classes, from states in fp32."""
    return context.precise().log_p(samples, theta, np.zeros(context.classes, np.float32))


def step_graphs(context: TrainingContext) -> StepGraphEngine:
    """The engine of a virtual device. Raises TypeError if it does not return gradients."""
    if not isinstance(context.engine, StepGraphEngine):
        raise TypeError(f"{context.device_name} has the engine {context.engine.name}; methods need step-graph")
    return context.engine
