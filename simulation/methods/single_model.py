"""Methods whose devices predict with one model each: the shared one, or a personal one that starts from it."""

from __future__ import annotations

from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.arrays import Floats, Vector
from simulation.fleet import Fleet
from simulation.methods.base import Method, MethodSettings, RoundCost
from simulation.methods.local_training import log_p
from simulation.methods.server import State, start_theta


class SingleModel(Method[State, Vector]):
    """`restricted`: see `cross_entropy`."""

    restricted: bool

    def start(self, fleet: Fleet, settings: MethodSettings) -> tuple[State, RoundCost]:
        theta, cost = start_theta(fleet, settings)
        return State(settings, theta), cost

    def model(self, state: State, device: str) -> Vector:
        return state.personal.get(device, state.shared)

    def log_p(self, context: TrainingContext, model: Vector, samples: Samples) -> dict[str, Floats]:
        return {self.name: log_p(context, samples, model)}
