"""FedALT (Bian et al., "FedALT: Federated Fine-Tuning Through Adaptive Local Training with Rest-of-World LoRA",
AAAI 2026, arXiv 2503.11880), checked against the authors' code.

A device trains its individual LoRA from where it left it, never from an average. Beside it is the rest-of-world (RoW)
LoRA, which is frozen: the unweighted means of the other devices' A and B. A linear router with softmax weighs the two
for each input. The individual LoRA is sent, the router is not. In round 0 the RoW LoRA is the start.

Departures: the paper has a router in each adapted layer, which weighs each token. Here a device has one router, which
weighs each sample by the pooled feature of the frozen backbone: the graphs of a bundle have no place for others. For
these weights, forward pass and gradients are exact. The router starts from zero instead of at random. An adapter
includes a head, combined with the same weights (ours). A device that took no part has the start, the mean over all
devices as RoW, and weights of ½; it adapts by training its LoRA and router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from edge_runtime.data.samples import labels_of
from edge_runtime.engines.base import expert_decay
from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import Doubles, Floats, Vector
from fedfmsl.algorithms.mixture import log_softmax
from fedfmsl.protocol.messages import Training
from simulation.fleet import Fleet
from simulation.methods.base import Method, MethodSettings, RoundCost, round_seed
from simulation.methods.dual_lora import Adapters, weighted_log_p, wide_engine
from simulation.methods.local_training import cross_entropy, shuffled_steps
from simulation.methods.server import State, exchange, start_theta
from simulation.spill import StoredArrays


@dataclass(frozen=True, kw_only=True)
class AltState(State):
    """`shared` (P,): the start. `personal`: the individual adapters (P,). `sent`: those that the server has received.
    `routers`: by device, (2, F); `untrained` is that of all others."""

    sent: StoredArrays = field(default_factory=StoredArrays)
    routers: StoredArrays = field(default_factory=StoredArrays)
    untrained: Floats

    @cached_property
    def total(self) -> Doubles:
        """The sum (P,) of all adapters that were sent."""
        total = np.zeros(self.shared.size)
        for name in sorted(self.sent):
            total += self.sent[name]
        return total

    def model(self, device: str) -> Model:
        others = len(self.sent) - (device in self.sent)
        rest = np.asarray((self.total - self.sent.get(device, 0.0)) / others, np.float32) if others else self.shared
        return Model(self.personal.get(device, self.shared), rest, self.routers.get(device, self.untrained))


@dataclass(frozen=True)
class Model:
    """`individual`, `rest` (P,): the adapters. `router` (2, F): their logits are router · pooled feature."""

    individual: Vector
    rest: Vector
    router: Floats


@dataclass(frozen=True)
class Task:
    """`restricted`: see `cross_entropy`."""

    model: Model
    training: Training
    seed: Sequence[int]
    restricted: bool


def train_individual(context: TrainingContext, task: Task) -> Model:
    """Trains the individual adapter and the router; the rest of the world is frozen."""
    samples, training = context.splits.train, task.training
    individual, rest, router = task.model.individual, task.model.rest, task.model.router
    adapters, engine, level = Adapters.of(context.bundle), wide_engine(context), context.level_of(individual)
    engine.load(level)
    hidden, labels = context.cache.frozen(samples, level), labels_of(samples)
    pooled = context.cache.pooled(samples, level)
    decay = expert_decay(context.bundle.expert, individual.size, training.weight_decay)
    optimizer = AdamW(training.learning_rate, decay)
    router_optimizer = AdamW(training.learning_rate, np.full(router.size, training.weight_decay, np.float32))
    for chosen in shuffled_steps(len(samples), training, task.seed):
        gradient, router_gradient = np.zeros_like(individual), np.zeros_like(router)
        for row, state in zip(chosen, hidden.batch(chosen), strict=True):
            weights = np.exp(log_softmax(router @ pooled[row]))
            engine.set(adapters.combine(individual, rest, weights))
            batch = cross_entropy(context, state[None], labels[[row]], task.restricted)
            of_individual, of_weights = adapters.gradients(individual, rest, weights, engine.gradient(batch)[1])
            gradient += of_individual / np.float32(len(chosen))
            of_logits = weights * (of_weights - weights @ of_weights)  # through the softmax
            router_gradient += np.outer(of_logits, pooled[row]) / np.float32(len(chosen))
        individual = optimizer.step(individual, gradient)
        router = router_optimizer.step(router.ravel(), router_gradient.ravel()).reshape(router.shape)
    return Model(individual, rest, router)


class FedALT(Method[AltState, Model]):
    name = "fedalt"
    title = "FedALT"
    source = "Bian et al., AAAI 2026"
    restricted = False

    def start(self, fleet: Fleet, settings: MethodSettings) -> tuple[AltState, RoundCost]:
        untrained = np.zeros((2, fleet.bundle.manifest.dims.feature), np.float32)
        theta, cost = start_theta(fleet, settings)
        return AltState(settings=settings, shared=theta, untrained=untrained), cost

    def round(self, fleet: Fleet, state: AltState, devices: Sequence[str], index: int) -> tuple[AltState, RoundCost]:
        state = _train(fleet, state, devices, index, self.restricted)
        sent = state.sent.updated((name, state.personal[name]) for name in devices)
        return replace(state, sent=sent), exchange(fleet.bundle, state.shared, devices)

    def adapt(self, fleet: Fleet, state: AltState, devices: Sequence[str]) -> AltState:
        for index in state.settings.stage2_indices:
            state = _train(fleet, state, devices, index, self.restricted)
        return state

    def model(self, state: AltState, device: str) -> Model:
        return state.model(device)

    def log_p(self, context: TrainingContext, model: Model, samples: Samples) -> dict[str, Floats]:
        pooled = context.cache.precise().pooled(samples, context.level_of(model.individual))
        weights = np.exp(log_softmax(pooled @ model.router.T))
        return {self.name: weighted_log_p(context, samples, model.individual, model.rest, weights)}


def _train(fleet: Fleet, state: AltState, devices: Sequence[str], index: int, restricted: bool) -> AltState:
    settings = state.settings
    training = settings.training_of(index)
    tasks = {name: Task(state.model(name), training, round_seed(settings, name, index), restricted) for name in devices}
    results = fleet.map(train_individual, tasks)
    return replace(
        state,
        personal=state.personal.updated((name, model.individual) for name, model in results.items()),
        routers=state.routers.updated((name, model.router) for name, model in results.items()),
    )
