"""FedSA-LoRA (Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025).

A and B are trained together; only A is sent and averaged. B stays on the device, and so does the head: the authors'
configuration lists `classifier` among the local parameters. A device that took no part has the averaged A, and B and
head of the start. It adapts by training B and head (ours; the paper has no such devices).
"""

from __future__ import annotations

import numpy as np

from edge_runtime.training.context import TrainingContext
from fedfmsl.protocol.layout import Slot
from simulation.methods.local_training import is_lora_a
from simulation.methods.partial_sharing import PartialSharing, Task, train_part
from simulation.methods.server import Trained


def train_all(context: TrainingContext, task: Task) -> Trained:
    return train_part(context, task, np.ones_like(task.theta))


class FedSALoRA(PartialSharing):
    name = "fedsa-lora"
    title = "FedSA-LoRA"
    source = "Guo et al., ICLR 2025"
    train = train_all

    def is_shared(self, slot: Slot) -> bool:
        return is_lora_a(slot)
