"""FedAvg, then fine-tuning: the simplest personalization (Yu, Bagdasaryan & Shmatikov 2020; Collins et al., ICML 2021,
section 5, compare with it).

FedIT until the last rounds, those of stage 2. In those, each selected device trains all trainables on its own samples,
from the global ones on, and sends nothing. The optimizer is new in each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from simulation.fleet import Fleet
from simulation.methods.base import RoundCost, round_seed
from simulation.methods.fedit import FedIT, Task, train_received
from simulation.methods.local_training import everything, mask
from simulation.methods.server import State, wire_bytes


class FineTuning(FedIT):
    name = "fine-tuning"
    title = "FedAvg + fine-tuning"
    source = "Yu et al., 2020"

    def round(self, fleet: Fleet, state: State, devices: Sequence[str], index: int) -> tuple[State, RoundCost]:
        if index not in state.settings.stage2_indices:
            return super().round(fleet, state, devices, index)
        received = dict.fromkeys(set(devices) - state.personal.keys(), wire_bytes(fleet.bundle, state.shared))
        return fine_tune(fleet, state, devices, index, self.restricted), RoundCost(bytes_down=received)

    def adapt(self, fleet: Fleet, state: State, devices: Sequence[str]) -> State:
        for index in state.settings.stage2_indices:
            state = fine_tune(fleet, state, devices, index, self.restricted)
        return state


def fine_tune(fleet: Fleet, state: State, devices: Sequence[str], index: int, restricted: bool) -> State:
    """Each device trains its own model, at first the shared one, with the settings of round `index`."""
    settings = state.settings
    trained = mask(fleet.bundle.expert, state.shared.size, everything)
    tasks = {
        name: Task(
            state.personal.get(name, state.shared),
            settings.training_of(index),
            round_seed(settings, name, index),
            trained,
            restricted,
        )
        for name in devices
    }
    results = fleet.map(train_received, tasks)
    return replace(state, personal=state.personal.updated((name, result.theta) for name, result in results.items()))
