"""FedRep (Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021,
algorithm 1), with LoRA as the representation.

In each round a device first trains its personal head with the received body frozen, then the body with the head frozen,
and sends the body. The paper takes 10 epochs for the head and 1 to 5 for the body. Here both phases share the epochs of
the round, so that the number of steps equals that of other methods. A device that took no part has the body and the
head of the start; it adapts by training the head on the frozen body, as in the paper's section on new clients.
"""

from __future__ import annotations

from edge_runtime.training.context import TrainingContext
from fedfmsl.protocol.layout import Slot
from simulation.methods.local_training import halves, is_head, shuffled_steps, train_steps
from simulation.methods.partial_sharing import PartialSharing, Task
from simulation.methods.server import Trained


def train_head_then_body(context: TrainingContext, task: Task) -> Trained:
    samples, theta = context.splits.train, task.theta
    steps = shuffled_steps(len(samples), task.training, task.seed)
    phases = zip(halves(steps, task.index), (1 - task.is_shared, task.is_shared), strict=True)
    for part, trained in phases:
        theta = train_steps(context, samples, theta, part, task.training, trained, restricted=task.restricted)
    return Trained(theta, len(samples))


class FedRep(PartialSharing):
    name = "fedrep"
    title = "FedRep"
    source = "Collins et al., ICML 2021"
    train = train_head_then_body

    def is_shared(self, slot: Slot) -> bool:
        return not is_head(slot)
