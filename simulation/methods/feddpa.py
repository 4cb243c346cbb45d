"""FedDPA-T (Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024, arXiv 2403.19211),
checked against the authors' code.

In each round a device first trains its local adapter in a forward pass in which the received global adapter is frozen
and both have weight ½, then the global adapter alone, which it sends. Round 0 trains the global adapter only, as in the
code. In the variant FedDPA-F the local adapter is trained after the federation.

Predictions use α · local + (1 - α) · global adapter, with α for each sample: λ = ½ times its mean cosine similarity to
S = 5 training samples of the device, between features of the model with the local adapter. The paper reads the last
token of the last layer, here it is the class token. The code draws other S samples for each prediction; here they are
drawn once for each device, so that a prediction does not depend on those before.

Both phases share the steps of the round, so that their number equals that of other methods. An adapter includes a head,
combined with the same weights (ours). A device that took no part has the global adapter; it adapts by training a local
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.data.features import HiddenStates
from edge_runtime.data.samples import labels_of
from edge_runtime.engines.base import expert_decay
from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.protocol.messages import Training
from simulation.fleet import Fleet
from simulation.methods.base import Method, MethodSettings, RoundCost, round_seed
from simulation.methods.dual_lora import Adapters, weighted_log_p, wide_engine
from simulation.methods.local_training import (
    Steps,
    cross_entropy,
    halves,
    log_p,
    shuffled_steps,
    step_graphs,
    train_steps,
)
from simulation.methods.server import State, Trained, average, exchange, start_theta

HALF = np.full(2, 0.5, np.float32)
MAX_WEIGHT = 0.5  # λ
COMPARED = 5  # S


@dataclass(frozen=True, kw_only=True)
class DualState(State):
    """`start` (P,): the local adapter of a device that has not trained one."""

    start: Vector


@dataclass(frozen=True)
class Task:
    """`shared` (P,): the global adapter. `personal` (P,): the local one. `own`, `sent`: whether each is trained.
    `restricted`: see `cross_entropy`."""

    shared: Vector
    personal: Vector
    training: Training
    seed: Sequence[int]
    index: int
    restricted: bool
    own: bool = True
    sent: bool = True


@dataclass(frozen=True)
class Pair(Trained):
    """`theta`: the trained global adapter (P,). `personal`: the trained local one (P,)."""

    personal: Vector


@dataclass(frozen=True)
class Model:
    """`personal` (P,): None for a device without a local adapter."""

    shared: Vector
    personal: Vector | None
    seed: int


def train_adapters(context: TrainingContext, task: Task) -> Pair:
    samples = context.splits.train
    steps = shuffled_steps(len(samples), task.training, task.seed)
    if task.own and task.sent:
        own, sent = halves(steps, task.index)
    else:
        own, sent = (steps, []) if task.own else ([], steps)
    personal = train_local(context, samples, task, own)
    everything = np.ones_like(task.shared)
    shared = train_steps(context, samples, task.shared, sent, task.training, everything, None, task.restricted)
    return Pair(shared, len(samples), personal)


def train_local(context: TrainingContext, samples: Samples, task: Task, steps: Steps) -> Vector:
    """The local adapter (P,) after steps of ½ · local + ½ · global adapter with the global one frozen."""
    adapters, engine, personal = Adapters.of(context.bundle), wide_engine(context), task.personal
    level = context.level_of(personal)
    engine.load(level)
    hidden, labels = context.cache.frozen(samples, level), labels_of(samples)
    decay = expert_decay(context.bundle.expert, personal.size, task.training.weight_decay)
    optimizer = AdamW(task.training.learning_rate, decay)
    for chosen in steps:
        engine.set(adapters.combine(personal, task.shared, HALF))
        _, gradient = engine.gradient(cross_entropy(context, hidden.batch(chosen), labels[chosen], task.restricted))
        personal = optimizer.step(personal, adapters.gradients(personal, task.shared, HALF, gradient)[0])
    return personal


def local_weights(context: TrainingContext, samples: Samples, personal: Vector, seed: int) -> Floats:
    """α (n,) of each sample."""
    own = context.splits.train
    rng = np.random.default_rng([seed, *context.device_name.encode()])
    compared = tuple(own[index] for index in rng.permutation(len(own))[:COMPARED])
    engine, level = step_graphs(context), context.level_of(personal)
    engine.load(level)
    engine.set(personal)

    def directions(states: HiddenStates) -> Floats:
        rows = np.concatenate([engine.features(batch) for batch in states.batches()])
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)

    predicted, known = context.cache.precise().frozen(samples, level), context.cache.frozen(compared, level)
    return np.asarray(MAX_WEIGHT * (directions(predicted) @ directions(known).T).mean(axis=1), np.float32)


class FedDPA(Method[DualState, Model]):
    name = "feddpa"
    title = "FedDPA-T"
    source = "Yang et al., NeurIPS 2024"
    restricted = True

    def start(self, fleet: Fleet, settings: MethodSettings) -> tuple[DualState, RoundCost]:
        theta, cost = start_theta(fleet, settings)
        return DualState(settings=settings, shared=theta, start=theta), cost

    def round(self, fleet: Fleet, state: DualState, devices: Sequence[str], index: int) -> tuple[DualState, RoundCost]:
        results = fleet.map(train_adapters, self._tasks(state, devices, index, own=index > 0))
        shared = average(fleet.bundle, state.shared, results)
        if index > 0:
            state = _kept(state, results)
        return replace(state, shared=shared), exchange(fleet.bundle, shared, devices)

    def adapt(self, fleet: Fleet, state: DualState, devices: Sequence[str]) -> DualState:
        for index in state.settings.stage2_indices:
            state = _kept(state, fleet.map(train_adapters, self._tasks(state, devices, index, sent=False)))
        return state

    def model(self, state: DualState, device: str) -> Model:
        return Model(state.shared, state.personal.get(device), state.settings.seed)

    def log_p(self, context: TrainingContext, model: Model, samples: Samples) -> dict[str, Floats]:
        if model.personal is None or not samples:
            return {self.name: log_p(context, samples, model.shared)}
        local = local_weights(context, samples, model.personal, model.seed)
        weights = np.stack([local, 1 - local], axis=1)
        return {self.name: weighted_log_p(context, samples, model.personal, model.shared, weights)}

    def _tasks(
        self, state: DualState, devices: Sequence[str], index: int, own: bool = True, sent: bool = True
    ) -> dict[str, Task]:
        settings, training = state.settings, state.settings.training_of(index)
        return {
            name: Task(
                state.shared,
                state.personal.get(name, state.start),
                training,
                round_seed(settings, name, index),
                index,
                self.restricted,
                own,
                sent,
            )
            for name in devices
        }


def _kept(state: DualState, results: Mapping[str, Pair]) -> DualState:
    return replace(state, personal=state.personal.updated((name, pair.personal) for name, pair in results.items()))
