"""What a run is at one moment: the plan, which never changes, and the state, which every event may.

Both are values. Tensors of accepted updates are not part of the state; they are found by their SHA-256 through
`Plan.read`, so that a round with a thousand updates takes no more memory than one with ten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.sal import SalState
from fedfmsl.algorithms.server_optimizers import Moments
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import DeviceStatus, Round, Stage, Update
from fedfmsl.protocol.tensors import Tensors
from trainer_server.config import RunConfig

TRAINING = (Stage.GLOBAL, Stage.PERSONAL)


@dataclass(frozen=True)
class Step:
    """Round `index` of the `of` rounds of a stage."""

    stage: Stage
    index: int
    of: int


@dataclass(frozen=True)
class Plan:
    """What does not change during a run. `read` gives the tensors of an accepted update by their blob's SHA-256: as
    good as a pure function, for what has that hash cannot change."""

    config: RunConfig
    bundle: Bundle
    session: str
    read: Callable[[str], Tensors]

    @cached_property
    def schedule(self) -> list[Step]:
        """Every round of the run in order, the last of them FINISHED."""
        config = self.config
        rounds = {
            Stage.STATISTICS: 1,
            Stage.GLOBAL: config.stage1_rounds,
            Stage.PERSONAL: config.stage2_rounds,
            Stage.BASELINE: int(config.baseline),
            Stage.EVALUATE: 1,
            Stage.FINISHED: 1,
        }
        return [Step(stage, index, of) for stage, of in rounds.items() for index in range(of)]

    @cached_property
    def statistics(self) -> Layout:
        """The layout of what devices send in the round of statistics."""
        dims = self.bundle.manifest.dims
        return Layout.build(
            [
                ("statistics", "class_sums", (dims.classes, dims.feature)),
                ("statistics", "class_counts", (dims.classes,)),
                ("statistics", "norm_sum", (1,)),
            ]
        )


@dataclass(frozen=True)
class Accepted:
    """An update that counts: its header, where its tensors are, how many bytes it took on the wire."""

    update: Update
    sha256: str
    size: int


Key = tuple[int, str]  # round and device: what an update counts for, once


@dataclass(frozen=True)
class State:
    """`position` in the schedule, -1 while devices are gathering. `expert` (P,) is of the bundle's highest level, its
    blocks above SAL's level untrained; `start` (P₁,) is what stage 1 starts from, `gate` (G,) the gate adapter; each
    has its server optimizer's moments. `since`: when the round was announced, by the run's clock. `expected`: the
    devices that were asked. `updates`: what the present round will be made of. `recent`: rounds that
    are closed and whose updates may still count. `counted`: every update accepted in the rounds that one could still
    come from, or come again from."""

    expert: Vector
    gate: Vector
    start: Vector
    expert_moments: Moments
    gate_moments: Moments
    sal: SalState
    since: float
    position: int = -1
    round: int = 0
    repeats: int = 0
    announced: Round | None = None
    devices: Mapping[str, DeviceStatus] = field(default_factory=dict)
    expected: frozenset[str] = frozenset()
    updates: Mapping[Key, Accepted] = field(default_factory=dict)
    recent: tuple[Round, ...] = ()
    counted: frozenset[Key] = frozenset()

    @property
    def online(self) -> frozenset[str]:
        return frozenset(name for name, status in self.devices.items() if status.online)

    @property
    def ready(self) -> frozenset[str]:
        """Who is online and may train at present."""
        return frozenset(name for name in self.online if not self.devices[name].paused)

    @property
    def answered(self) -> frozenset[str]:
        return frozenset(device for _, device in self.updates)


def initial_state(plan: Plan, now: float) -> State:
    expert, gate = plan.bundle.initial()
    return State(
        expert=expert,
        gate=gate,
        start=np.empty(0, np.float32),
        expert_moments=Moments.zeros(expert.size),
        gate_moments=Moments.zeros(gate.size),
        sal=plan.config.stage1_sal.start(),
        since=now,
    )
