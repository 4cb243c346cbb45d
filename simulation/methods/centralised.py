"""Centralised training: the training samples of all devices pooled on one, the ceiling of a federation.

The pool is trained for as many epochs as a device trains, so an epoch has as many steps as those of all devices
together. Sending the files of the samples is counted once, in the first round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.messages import Training
from simulation.fleet import Fleet
from simulation.methods.base import RoundCost, round_seed
from simulation.methods.local_training import everything, mask, shuffled_steps, train_steps
from simulation.methods.server import State
from simulation.methods.single_model import SingleModel


@dataclass(frozen=True)
class Task:
    theta: Vector
    samples: Samples
    training: Training
    seed: Sequence[int]


def train_pool(context: TrainingContext, task: Task) -> Vector:
    trained = mask(context.bundle.expert, task.theta.size, everything)
    steps = shuffled_steps(len(task.samples), task.training, task.seed)
    return train_steps(context, task.samples, task.theta, steps, task.training, trained)


class Centralised(SingleModel):
    name = "centralised"
    title = "Centralised"
    source = "no federation"

    def round(self, fleet: Fleet, state: State, devices: Sequence[str], index: int) -> tuple[State, RoundCost]:
        settings, host = state.settings, fleet.names[0]
        samples = tuple(sample for name in fleet.names for sample in fleet.splits(name).train)
        task = Task(state.shared, samples, settings.training_of(index), round_seed(settings, host, index))
        theta = fleet.map(train_pool, {host: task})[host]
        return State(settings, theta), _upload(fleet) if index == 0 else RoundCost()


def _upload(fleet: Fleet) -> RoundCost:
    sizes = {name: sum(sample.path.stat().st_size for sample in fleet.splits(name).train) for name in fleet.names}
    return RoundCost(bytes_up=sizes)
