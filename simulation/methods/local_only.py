"""Local-only LoRA: every device trains alone, for as many steps as in the federation.

Nothing is sent. So the head starts from the class means of the device's own samples, not from the federated ones that
all other methods start from. A device without training has this start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.training.context import TrainingContext
from edge_runtime.training.stages import class_mean_expert
from fedfmsl.algorithms.arrays import Vector
from simulation.fleet import Fleet
from simulation.methods.base import MethodSettings, RoundCost
from simulation.methods.fine_tuning import fine_tune
from simulation.methods.server import State
from simulation.methods.single_model import SingleModel
from simulation.spill import StoredArrays


def own_start(context: TrainingContext, level: int) -> Vector:
    """The trainables of `level` (P,) with initial LoRA and the head of the device's own class means."""
    return class_mean_expert(context)[: context.bundle.expert.size(level)]


class LocalOnly(SingleModel):
    name = "local-only"
    title = "Local-only LoRA"
    source = "no federation"
    restricted = True

    def start(self, fleet: Fleet, settings: MethodSettings) -> tuple[State, RoundCost]:
        starts = fleet.each(own_start, [(name, settings.level) for name in (*fleet.names, *fleet.unseen)])
        size = fleet.bundle.expert.size(settings.level)
        return State(settings, np.zeros(size, np.float32), StoredArrays(starts)), RoundCost()

    def round(self, fleet: Fleet, state: State, devices: Sequence[str], index: int) -> tuple[State, RoundCost]:
        return fine_tune(fleet, state, devices, index, self.restricted), RoundCost()

    def adapt(self, fleet: Fleet, state: State, devices: Sequence[str]) -> State:
        for index in range(state.settings.rounds):
            state = fine_tune(fleet, state, devices, index, self.restricted)
        return state
