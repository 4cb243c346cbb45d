"""The plan of a session, which never changes, and its state, which events change. Both are immutable values.

Tensors of accepted updates are not part of the state. `Plan.read` loads them by SHA-256, so that a round with a
thousand updates needs no more memory than one with ten.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedfmsl.algorithms.arrays import Tensors, Vector
from fedfmsl.algorithms.fixed_point import Words
from fedfmsl.algorithms.sal import SalState
from fedfmsl.algorithms.secure_aggregation import VECTORS, Bytes
from fedfmsl.algorithms.server_optimizers import Moments
from fedfmsl.common.persistent_map import PersistentMap, remembered
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import DeviceStatus, Round, Stage, Sums, Update
from fedfmsl.protocol.secure_sums import SignedKeys
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.config import Head, RunConfig
from trainer_server.coordinator.candidates import LastGood, Rollback
from trainer_server.coordinator.former_head import RETRAINED, FormerHead
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.refusals import Refused
from trainer_server.coordinator.standing import Standing
from trainer_server.coordinator.warm_start import WarmStart

TRAINING = (Stage.GLOBAL, Stage.PERSONAL)
SUMS = (Stage.STATISTICS, Stage.HEAD)

CheckKeys = Callable[[str, SignedKeys, bytes], None]  # name and keys of a device, and what it must have signed


def unsigned(name: str, signed: SignedKeys, message: bytes) -> None:
    """Accepts all keys, where devices have no certificates."""


Part = tuple[Stage, int]  # the rounds of secure aggregation around this round of a stage


@dataclass(frozen=True)
class Step:
    """Round `index` of a stage that has `of` rounds. `part`: the secure aggregation that it belongs to."""

    stage: Stage
    index: int
    of: int
    part: Part | None = None

    @property
    def purpose(self) -> Stage:
        """The stage that the round is for: that of the vectors which a secure aggregation sums."""
        return self.part[0] if self.part else self.stage


@dataclass(frozen=True)
class Plan:
    """What is constant during a session of a run. `read` loads the tensors of an accepted update, or of a global expert
    that the operator returns to, by the SHA-256 of the blob.

    `check_keys` raises MessageError if signed keys are not valid. Without `masks`, as in a simulation, the vectors of
    secure sums are not masked, and have the same sum. `scratch`: the folder for what of a round does not fit in memory;
    None: that of temporary files. `warm`: what the run goes on from, if it does not start afresh.
    """

    config: RunConfig
    bundle: TaskBundle
    session: str
    read: Callable[[str], Tensors]
    check_keys: CheckKeys = unsigned
    masks: bool = True
    scratch: Path | None = None
    warm: WarmStart | None = None

    @cached_property
    def schedule(self) -> list[Step]:
        """Every round of the run in order. The last one is FINISHED."""
        config = self.config
        has_new_rows = self.warm is None or not self.warm.kept.all()
        rounds = {
            Stage.STATISTICS: int(config.head is not Head.ZEROS and has_new_rows),
            Stage.GLOBAL: config.stage1_rounds,
            Stage.HEAD: int(config.replaces_head),
            Stage.CANARY: int(config.canary is not None and config.stage1_rounds > 0),
            Stage.PERSONAL: config.stage2_rounds,
            Stage.BASELINE: int(config.baseline),
            Stage.EVALUATE: 1,
            Stage.FINISHED: 1,
        }
        plain = [Step(stage, index, of) for stage, of in rounds.items() for index in range(of)]
        masked = [step for step in plain if self._is_secure(step.stage)]
        steps = []
        for step in plain:
            steps += list(self._secure(step, masked.index(step), len(masked))) if step in masked else [step]
        return steps

    def _is_secure(self, stage: Stage) -> bool:
        config = self.config
        sums = config.secure or (config.secure_sums and config.privacy is None)
        return (stage in SUMS and sums) or (stage in TRAINING and config.secure)

    def _secure(self, masked: Step, execution: int, executions: int) -> Iterator[Step]:
        """The rounds of the secure aggregation of a round (see `fedfmsl.protocol.secure_sums`). Before class sums, the
        samples and the holders of each class are counted, if a class needs several."""
        part = (masked.stage, masked.index)
        vectors = [replace(masked, part=part)]
        is_counted = max(self.config.min_class_count, self.config.min_holders) > 1 and self.config.privacy is None
        if masked.stage in SUMS and is_counted:
            vectors = [Step(Stage.HOLDERS, SUMS.index(masked.stage), len(SUMS), part), *vectors]
        if self.masks:
            yield Step(Stage.KEYS, execution, executions, part)
            yield Step(Stage.SHARES, execution, executions, part)
        for step in vectors:
            yield step
            if self.masks:
                vector = int(step.stage is not Stage.HOLDERS)
                yield Step(Stage.UNMASK, VECTORS * execution + vector, VECTORS * executions, part)

    def positions_of(self, part: Part) -> range:
        """The positions of the schedule that belong to a secure aggregation."""
        positions = [position for position, step in enumerate(self.schedule) if step.part == part]
        return range(positions[0], positions[-1] + 1)

    @property
    def retraining(self) -> int:
        """The position from which stage 1 is trained again after a rejected head."""
        rounds = [position for position, step in enumerate(self.schedule) if step.stage is Stage.GLOBAL]
        return rounds[-RETRAINED:][0]

    @cached_property
    def statistics(self) -> Layout:
        """The layout of updates in the statistics round."""
        return self._sums(self.bundle.manifest.dims.feature, ("norm_sum", 1))

    @cached_property
    def head_statistics(self) -> Layout:
        """The layout of updates in the head round."""
        classes, feature = len(self.bundle.classes), self.bundle.manifest.dims.feature
        width = classes if self.config.head_sums is Sums.LOGITS else feature
        return self._sums(width, ("second_moments", width * (width + 1) // 2))

    @property
    def largest_update(self) -> int:
        """Values in the largest update of any stage, of four bytes each."""
        bundle = self.bundle
        values = max(bundle.expert.total, bundle.gate.total, self.statistics.total, self.head_statistics.total)
        return 2 * values + 4096 if self.config.secure or self.config.secure_sums else values

    def _sums(self, width: int, last: tuple[str, int]) -> Layout:
        classes, (name, size) = len(self.bundle.classes), last
        return Layout.build(
            [
                ("statistics", "class_sums", (classes, width)),
                ("statistics", "class_counts", (classes,)),
                ("statistics", name, (size,)),
            ]
        )


@dataclass(frozen=True, slots=True)
class Accepted:
    """Header of an accepted update, SHA-256 of its blob, bytes on the wire, L2 norm of what it trained."""

    update: Update
    sha256: str
    size: int
    norm: float


@dataclass(frozen=True)
class SecureSums:
    """The secure aggregation in progress (see `fedfmsl.protocol.secure_sums`).

    `roster`: the published keys. `keys_round`: the round in which they were sent. `level`: that of its rounds.
    `members`: the devices that mask the next vector. `survivors`: those whose masked vectors have arrived, with the sum
    `masked` (P,). `shares` (n, H, SHARE_BYTES): the published shares. `classes`: those with enough holders.
    """

    roster: Tensors = field(default_factory=dict)
    keys_round: int = 0
    level: int = 0
    members: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    shares: Bytes = field(default_factory=lambda: np.empty((0, 0, 0), np.uint8))
    masked: Words = field(default_factory=lambda: np.empty(0, np.uint64))


NO_SUMS = SecureSums()
Key = tuple[int, str]  # round and device: one update counts for each


@dataclass(frozen=True)
class State:
    """The state of a run between two events.

    Globals: `expert` (P,) has the bundle's highest level, and its blocks above SAL's level are untrained. `start` is
    the expert that stage 1 starts from: (P₁,), or with the level of a warm start. If its head is zeros, that of the
    first round of stage 1 replaces it. `gate` (G,) is the gate adapter. `made`: the closed round that made the global
    expert. `good`: the last one that was not rejected (`trainer_server.coordinator.candidates`).

    `norms`: the median norms of the updates in the stage's last rounds. `agreements`: by device, how much its updates
    of the stage agree with those of others (`fedfmsl.algorithms.agreement`). `left_out`: by device, how many rounds of
    the stage left its update out.

    Round: `position` in the schedule is -1 while the server waits for devices; `round` is then the last one of the
    session before, or 0. `since` is the time of the announcement. `expected` are the selected devices. `updates` are
    the accepted updates of the present round. `refused`: devices whose latest updates were refused. `silent`: those
    that did not answer in a secure sum, each with the last round that leaves it out.

    Deadlines: `limits` are the settings that may change. `stretch`: how many times as long as `--round-timeout` a round
    lasts. `slowest`: by stage, the longest time from an announcement to an update, in seconds.

    Late updates: `recent` are closed rounds whose late updates still count. `counted` are, by round, the devices whose
    updates were accepted before the present round, for these rounds and the last REMEMBERED_ROUNDS. A second update for
    a round in `counted` or `updates` is a duplicate.

    `secure`: the secure aggregation in progress. `former`: what is known of the head of stage 1.

    `waiting`: the run waits until enough devices can answer (see `trainer_server.coordinator.waiting`).

    `rests_at`: since when the run rests, outside of the hours of --schedule or before --every is over. `standing`: what
    the first round of a session of a standing run waits for.

    What the operator has done: `paused_at` is when the run was paused, `rollback` where it returns to, `closing` the
    round to close now, `excluded` the devices that take part no more, `approved` the classes to add.
    """

    expert: Vector
    gate: Vector
    start: Vector
    expert_moments: Moments
    gate_moments: Moments
    sal: SalState
    since: float
    limits: Limits
    norms: tuple[float, ...] = ()
    agreements: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    stretch: int = 1
    slowest: Mapping[Stage, float] = field(default_factory=dict)
    position: int = -1
    round: int = 0
    repeats: int = 0
    announced: Round | None = None
    devices: PersistentMap[str, DeviceStatus] = field(default_factory=PersistentMap)
    expected: frozenset[str] = frozenset()
    refused: Mapping[str, Refused] = field(default_factory=dict)
    silent: Mapping[str, int] = field(default_factory=dict)
    updates: PersistentMap[Key, Accepted] = field(default_factory=PersistentMap)
    recent: tuple[Round, ...] = ()
    counted: Mapping[int, frozenset[str]] = field(default_factory=dict)
    secure: SecureSums = NO_SUMS
    former: FormerHead = field(default_factory=FormerHead)
    waiting: bool = False
    rests_at: float | None = None
    standing: Standing = field(default_factory=Standing)
    made: int = 0
    good: LastGood = field(default_factory=LastGood)
    paused_at: float | None = None
    rollback: Rollback | None = None
    closing: int = 0
    excluded: frozenset[str] = frozenset()
    approved: tuple[str, ...] = ()

    @property
    def trained(self) -> Vector:
        """The global expert (P,) with the head that stage 1 has trained, also if one of sums has replaced it. Further
        training changes it less (benchmarks/added_classes.md)."""
        head = self.former.head
        return np.concatenate([head, self.expert[head.size :]])

    @property
    def held_at(self) -> float | None:
        """Since when the run is paused, or rests. No round opens or closes meanwhile, and no deadline passes."""
        return min((at for at in (self.paused_at, self.rests_at) if at is not None), default=None)

    @property
    def online(self) -> frozenset[str]:
        """Devices that can take part."""
        online = _online(self.devices)
        return online - self.excluded if self.excluded else online

    @property
    def ready(self) -> frozenset[str]:
        """Devices that are online and not paused."""
        return frozenset(name for name in self.online if not self.devices[name].paused)

    @property
    def awaited(self) -> frozenset[str]:
        """The selected devices whose answer the present round needs: not those that have said that they cannot, that
        are paused, or whose update was refused."""
        return self.expected - (self.unable - self.answered)

    @property
    def unable(self) -> frozenset[str]:
        """The selected devices that have said that they cannot answer, are paused, or whose update was refused."""
        return _unable(self.devices, self.expected, self.refused, self.round)

    @property
    def answered(self) -> frozenset[str]:
        return frozenset(device for _, device in self.updates)

    @property
    def in_order(self) -> list[Accepted]:
        """The updates of the round in the order of their keys, which is the same for every order of arrival."""
        return [accepted for _, accepted in sorted(self.updates.items(), key=itemgetter(0))]


def after_hold(state: State, ended: Literal["paused_at", "rests_at"], now: float) -> State:
    """The state after the end of a pause or of a rest. If the other one lasts, it has begun with the first of the two,
    so that no second counts twice."""
    begun, other = state.held_at, {"paused_at": "rests_at", "rests_at": "paused_at"}[ended]
    assert begun is not None
    goes_on: dict[str, Any] = {"since": state.since + now - begun} if getattr(state, other) is None else {other: begun}
    return replace(state, **{ended: None, **goes_on})


def with_counted(counted: Mapping[int, frozenset[str]], keys: Iterable[Key]) -> dict[int, frozenset[str]]:
    """`State.counted` with further updates."""
    found: defaultdict[int, set[str]] = defaultdict(set)
    for round_, device in keys:
        found[round_].add(device)
    return {**counted, **{round_: counted.get(round_, frozenset()) | devices for round_, devices in found.items()}}


@remembered
def _online(devices: Mapping[str, DeviceStatus]) -> frozenset[str]:
    return frozenset(name for name, status in devices.items() if status.online and not status.error)


@remembered
def _unable(
    devices: Mapping[str, DeviceStatus], expected: frozenset[str], refused: Mapping[str, Refused], round_: int
) -> frozenset[str]:
    unable = {name for name in expected if devices[name].error or devices[name].paused}
    return frozenset(unable | {name for name, last in refused.items() if last.round == round_ and name in expected})


def initial_state(plan: Plan, now: float) -> State:
    config, warm = plan.config, plan.warm
    expert, gate = (warm.expert, warm.gate) if warm else plan.bundle.initial()  # without a warm start its head is zeros
    sal = config.stage1_sal.start()
    if warm:
        sal = replace(sal, level=max(sal.level, warm.level))
    first = plan.bundle.expert.size(1) if config.head is Head.ZEROS else 0
    return State(
        expert=expert,
        gate=gate,
        start=expert[: plan.bundle.expert.size(sal.level) if warm else first],
        expert_moments=Moments.zeros(expert.size),
        gate_moments=Moments.zeros(gate.size),
        sal=sal,
        since=now,
        limits=Limits.of(config),
    )
