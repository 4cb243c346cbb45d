"""Methods in which a device sends some of its trainables and keeps the others to itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.protocol.layout import Slot
from fedfmsl.protocol.messages import Training
from simulation.fleet import Fleet
from simulation.methods import fedit
from simulation.methods.base import Method, MethodSettings, RoundCost, round_seed
from simulation.methods.fedit import train_received
from simulation.methods.local_training import log_p, mask
from simulation.methods.server import State, Trained, average, exchange, start_theta


@dataclass(frozen=True, kw_only=True)
class PartialState(State):
    """`is_shared` (P,): 1 for the trainables that are sent. `personal` has all trainables of a device; only the others
    count."""

    is_shared: Vector

    def theta(self, device: str) -> Vector:
        """The trainables (P,) of a device: shared and its own. One that took no part has its own from the start."""
        own = self.personal.get(device, self.shared)
        return np.asarray(np.where(self.is_shared, self.shared, own), np.float32)


@dataclass(frozen=True)
class Task:
    """`theta` (P,): the device's trainables. `is_shared` (P,): 1 for those that are sent. `restricted`: see
    `cross_entropy`."""

    theta: Vector
    is_shared: Vector
    training: Training
    seed: Sequence[int]
    index: int
    restricted: bool


def train_part(context: TrainingContext, task: Task, trained: Vector) -> Trained:
    """Trains the trainables that are 1 in `trained` (P,)."""
    return train_received(context, fedit.Task(task.theta, task.training, task.seed, trained, task.restricted))


def train_own(context: TrainingContext, task: Task) -> Trained:
    """Trains only what is not shared."""
    return train_part(context, task, 1 - task.is_shared)


class PartialSharing(Method[PartialState, Vector]):
    """`train`: what a device computes in a round, defined in a module."""

    restricted: ClassVar[bool] = False
    train: ClassVar[Callable[[TrainingContext, Task], Trained]]

    @abstractmethod
    def is_shared(self, slot: Slot) -> bool:
        """Whether the tensor is sent and averaged."""

    def start(self, fleet: Fleet, settings: MethodSettings) -> tuple[PartialState, RoundCost]:
        theta, cost = start_theta(fleet, settings)
        is_shared = mask(fleet.bundle.expert, theta.size, self.is_shared)
        return PartialState(settings=settings, shared=theta, is_shared=is_shared), cost

    def round(
        self, fleet: Fleet, state: PartialState, devices: Sequence[str], index: int
    ) -> tuple[PartialState, RoundCost]:
        results = fleet.map(type(self).train, self._tasks(state, devices, index))
        sent = {
            name: replace(result, theta=np.where(state.is_shared, result.theta, state.shared))
            for name, result in results.items()
        }
        cost = exchange(fleet.bundle, state.shared, devices, self.is_shared)
        return replace(_kept(state, results), shared=average(fleet.bundle, state.shared, sent)), cost

    def adapt(self, fleet: Fleet, state: PartialState, devices: Sequence[str]) -> PartialState:
        for index in state.settings.stage2_indices:
            state = _kept(state, fleet.map(train_own, self._tasks(state, devices, index)))
        return state

    def model(self, state: PartialState, device: str) -> Vector:
        return state.theta(device)

    def log_p(self, context: TrainingContext, model: Vector, samples: Samples) -> dict[str, Floats]:
        return {self.name: log_p(context, samples, model)}

    def _tasks(self, state: PartialState, devices: Sequence[str], index: int) -> dict[str, Task]:
        settings, training = state.settings, state.settings.training_of(index)
        return {
            name: Task(
                state.theta(name),
                state.is_shared,
                training,
                round_seed(settings, name, index),
                index,
                self.restricted,
            )
            for name in devices
        }


def _kept(state: PartialState, results: Mapping[str, Trained]) -> PartialState:
    return replace(state, personal=state.personal.updated((name, result.theta) for name, result in results.items()))
