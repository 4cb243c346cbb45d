"""FedIT: FedAvg of LoRA (Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024,
arXiv 2305.05644, algorithm 1).

In each round the selected devices train the received adapter, and the server averages A and B each, weighted by
samples. The paper's models have no new head; here the head is trained and averaged like the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_runtime.training.context import TrainingContext
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.layout import Slot
from fedfmsl.protocol.messages import Training
from simulation.fleet import Fleet
from simulation.methods.base import RoundCost, round_seed
from simulation.methods.local_training import Proximal, mask, shuffled_steps, train_steps
from simulation.methods.server import State, Trained, average, exchange
from simulation.methods.single_model import SingleModel


@dataclass(frozen=True)
class Task:
    """`theta` (P,): the received trainables. `trained` (P,): 1 for those that the device trains. `proximal`: weight of
    the distance to `theta` in the loss. `restricted`: see `cross_entropy`."""

    theta: Vector
    training: Training
    seed: Sequence[int]
    trained: Vector
    restricted: bool
    proximal: float = 0.0


def train_received(context: TrainingContext, task: Task) -> Trained:
    """Trains the received trainables for the round's epochs."""
    samples = context.splits.train
    steps = shuffled_steps(len(samples), task.training, task.seed)
    proximal = Proximal(task.theta, task.proximal) if task.proximal else None
    theta = train_steps(context, samples, task.theta, steps, task.training, task.trained, proximal, task.restricted)
    return Trained(theta, len(samples))


class FedIT(SingleModel):
    name = "fedit"
    title = "FedAvg-LoRA (FedIT)"
    source = "Zhang et al., ICASSP 2024"
    proximal = 0.0
    restricted = True

    def is_trained(self, slot: Slot) -> bool:
        """Whether the devices train and send this tensor."""
        return True

    def round(self, fleet: Fleet, state: State, devices: Sequence[str], index: int) -> tuple[State, RoundCost]:
        settings, shared = state.settings, state.shared
        trained = mask(fleet.bundle.expert, shared.size, self.is_trained)
        training = settings.training_of(index)
        tasks = {
            name: Task(shared, training, round_seed(settings, name, index), trained, self.restricted, self.proximal)
            for name in devices
        }
        results = fleet.map(train_received, tasks)
        cost = exchange(fleet.bundle, shared, devices, self.is_trained)
        return State(settings, average(fleet.bundle, shared, results)), cost
