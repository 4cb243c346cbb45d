"""Ditto (Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, algorithm 1), with
LoRA.

In each round a device receives the global model w, takes steps on w for the server, and steps on its personal model v
with the gradient ∇F(v) + λ(v - w). v starts from the first w that the device receives, and is never restarted. Here v
and w share the steps of the round, so that their number equals that of other methods. The paper chooses λ of at most 2
on held-out samples. Here λ is 100, the best of 0.1 to 1000 on held-out samples: AdamW divides a gradient by its own
size, so that a smaller λ has little effect. A device that took no part has w; it adapts by training v from w on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.training.context import TrainingContext
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.messages import Training
from simulation.fleet import Fleet
from simulation.methods.base import RoundCost, round_seed
from simulation.methods.local_training import Proximal, halves, shuffled_steps, train_steps
from simulation.methods.server import State, Trained, average, exchange
from simulation.methods.single_model import SingleModel


@dataclass(frozen=True)
class Task:
    """`shared` (P,): w. `personal` (P,): v. `proximal`: λ. `restricted`: see `cross_entropy`. `alone`: all steps are
    those of v."""

    shared: Vector
    personal: Vector
    proximal: float
    restricted: bool
    training: Training
    seed: Sequence[int]
    index: int
    alone: bool = False


@dataclass(frozen=True)
class Pair(Trained):
    """`theta`: the trained w (P,). `personal`: the trained v (P,)."""

    personal: Vector


def train_both(context: TrainingContext, task: Task) -> Pair:
    samples, everything = context.splits.train, np.ones_like(task.shared)
    steps = shuffled_steps(len(samples), task.training, task.seed)
    own, sent = (steps, []) if task.alone else halves(steps, task.index)
    anchor = Proximal(task.shared, task.proximal)
    personal = train_steps(context, samples, task.personal, own, task.training, everything, anchor, task.restricted)
    shared = train_steps(context, samples, task.shared, sent, task.training, everything, None, task.restricted)
    return Pair(shared, len(samples), personal)


class Ditto(SingleModel):
    name = "ditto"
    title = "Ditto"
    source = "Li et al., ICML 2021"
    restricted = False

    def __init__(self, proximal: float = 100.0) -> None:
        """`proximal`: λ."""
        self.proximal = proximal

    def round(self, fleet: Fleet, state: State, devices: Sequence[str], index: int) -> tuple[State, RoundCost]:
        results = fleet.map(train_both, self._tasks(state, devices, index))
        shared = average(fleet.bundle, state.shared, results)
        return replace(_kept(state, results), shared=shared), exchange(fleet.bundle, state.shared, devices)

    def adapt(self, fleet: Fleet, state: State, devices: Sequence[str]) -> State:
        for index in state.settings.stage2_indices:
            tasks = self._tasks(state, devices, index)
            alone = {name: replace(task, alone=True) for name, task in tasks.items()}
            state = _kept(state, fleet.map(train_both, alone))
        return state

    def _tasks(self, state: State, devices: Sequence[str], index: int) -> dict[str, Task]:
        settings, shared = state.settings, state.shared
        training = settings.training_of(index)
        return {
            name: Task(
                shared,
                self.model(state, name),
                self.proximal,
                self.restricted,
                training,
                round_seed(settings, name, index),
                index,
            )
            for name in devices
        }


def _kept(state: State, results: Mapping[str, Pair]) -> State:
    return replace(state, personal=state.personal.updated((name, pair.personal) for name, pair in results.items()))
