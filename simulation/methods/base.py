"""The interface of federated methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.protocol.messages import Training
from simulation.fleet import Fleet

State = TypeVar("State")
Model = TypeVar("Model")


@dataclass(frozen=True)
class MethodSettings:
    """What all methods of a comparison have in common.

    `rounds`: communication rounds, of both stages together. `training`: of a device in one round. `level`: the highest
    level. `seed` determines everything that is random. `local_rounds`: those of stage 2, at the end, with
    `local_training`. Methods that personalize after the federation do it then; for others only the training differs.
    """

    rounds: int
    training: Training
    level: int
    seed: int
    local_rounds: int = 0
    local_training: Training | None = None

    @property
    def local_indices(self) -> range:
        """The rounds of stage 2."""
        return range(self.rounds - self.local_rounds, self.rounds)

    def training_of(self, index: int) -> Training:
        """The training of a device in round `index`."""
        return self.local_training if self.local_training and index in self.local_indices else self.training


@dataclass(frozen=True)
class RoundCost:
    """Bytes of a round by device. Seconds are in `Fleet.seconds`."""

    bytes_up: Mapping[str, int] = field(default_factory=dict)
    bytes_down: Mapping[str, int] = field(default_factory=dict)


class Method(Protocol[State, Model]):
    """A federated method. `State` is that of server and devices between two rounds; a `Model` is what one device
    predicts with. Computation on devices goes through `Fleet.map`.

    `name`: for commands and files. `title`: for tables. `source`: the paper.
    """

    name: str
    title: str
    source: str

    def start(self, fleet: Fleet, settings: MethodSettings) -> State:
        """The state before the first round. The devices of `fleet.unseen` take no part."""

    def round(self, fleet: Fleet, state: State, devices: Sequence[str], index: int) -> tuple[State, RoundCost]:
        """The state after round `index`, from 0, in which `devices` participate."""

    def adapt(self, fleet: Fleet, state: State, devices: Sequence[str]) -> State:
        """The state after `devices` that took no part have trained on their own, without sending anything. Methods
        without personal training return the state."""

    def model(self, state: State, device: str) -> Model:
        """The model of a device. A device that took no part has no personal state."""

    def log_p(self, context: TrainingContext, model: Model, samples: Samples) -> Floats:
        """Class log-probabilities (n, C) of a device's model for any samples, also those of other devices. For test
        samples `context.cache` should be `precise()`."""


def round_seed(settings: MethodSettings, device: str, index: int) -> list[int]:
    """One random stream for each (seed, device, round). The same for all methods."""
    return [settings.seed, *device.encode(), index]
