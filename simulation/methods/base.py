"""The interface of federated methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.protocol.messages import Training
from simulation.fleet import Fleet
from simulation.participation import Participation
from trainer_server.config import STAGE2

EVERY_DEVICE = Participation()
STAGE2_SHARE = 5 / 17  # of the rounds, as the server's defaults

State = TypeVar("State")
Model = TypeVar("Model")


def stage_rounds(rounds: int) -> tuple[int, int]:
    """The rounds of stage 1 and of stage 2, at least one each."""
    stage2 = max(1, round(STAGE2_SHARE * rounds))
    return max(1, rounds - stage2), stage2


@dataclass(frozen=True)
class MethodSettings:
    """What all methods of a comparison have in common.

    `rounds`: communication rounds, of both stages together. `training`: of a device in one round of stage 1. `level`:
    the highest level. `seed` determines everything that is random. `stage2`: the training in the last rounds. FedFMSL
    and methods that personalize after the federation do it then; for other methods only the training changes.
    `participation`: which devices answer a round that asks all of them.
    """

    rounds: int
    training: Training
    level: int
    seed: int
    stage2: Training = STAGE2
    participation: Participation = EVERY_DEVICE

    @property
    def stage2_indices(self) -> range:
        return range(self.rounds - stage_rounds(self.rounds)[1], self.rounds)

    def all_devices(self, fleet: Fleet, index: int) -> Sequence[str]:
        """The devices that answer a round that asks all of them, beside round `index` of training."""
        return self.participation.all_devices(train_sizes(fleet), index)

    def training_of(self, index: int) -> Training:
        """The training of a device in round `index`, from 0."""
        return self.stage2 if index in self.stage2_indices else self.training


def train_sizes(fleet: Fleet) -> dict[str, int]:
    """The number of training samples of each device."""
    return {name: len(fleet.splits(name).train) for name in fleet.names}


def _sum(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}


@dataclass(frozen=True)
class RoundCost:
    """Bytes of a round by device. Seconds are in `Fleet.seconds`."""

    bytes_up: Mapping[str, int] = field(default_factory=dict)
    bytes_down: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: RoundCost) -> RoundCost:
        """The bytes of both."""
        return RoundCost(_sum(self.bytes_up, other.bytes_up), _sum(self.bytes_down, other.bytes_down))


class Method(Protocol[State, Model]):
    """A federated method. `State` is that of server and devices between two rounds; a `Model` is what one device
    predicts with. Computation on devices goes through `Fleet.map`. Methods inherit from this class.

    `name`: for commands and files. `title`: for tables. `source`: the paper.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def source(self) -> str: ...

    @property
    def follows_level_caps(self) -> bool:
        """Whether a device trains the blocks up to its level cap only. Default: all devices train all blocks."""
        return False

    @property
    def adapting(self) -> Collection[str]:
        """The rows of `log_p` that adapt their class prior along a stream of samples (`label_shift`). Default: none."""
        return ()

    def start(self, fleet: Fleet, settings: MethodSettings) -> tuple[State, RoundCost]:
        """The state before the first round, and what it costs, for example to send class sums. The devices of
        `fleet.unseen` take no part."""

    def round(self, fleet: Fleet, state: State, devices: Sequence[str], index: int) -> tuple[State, RoundCost]:
        """The state after round `index`, from 0, in which `devices` participate."""

    def adapt(self, fleet: Fleet, state: State, devices: Sequence[str]) -> State:
        """The state after `devices` that took no part have trained on their own, without sending anything. Default: the
        same state, for methods without personal training."""
        return state

    def model(self, state: State, device: str) -> Model:
        """The model of a device. A device that took no part has no personal state."""

    def log_p(self, context: TrainingContext, model: Model, samples: Samples) -> dict[str, Floats]:
        """Class log-probabilities (n, C) of a device's model for any samples, also those of other devices.

        The method's own model is under `name`. More models of the same training may follow, under names of their own:
        each is a row of the table. The states of test samples are in fp32 only: use `context.cache.precise()`.
        """


def round_seed(settings: MethodSettings, device: str, index: int) -> list[int]:
    """One random stream for each (seed, device, round). The same for all methods."""
    return [settings.seed, *device.encode(), index]
