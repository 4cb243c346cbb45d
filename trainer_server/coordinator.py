"""A run as a state machine without I/O: `advance(plan, state, event, now) -> (state, commands)`.

    gather → statistics → global × n → personal × m → [baseline] → evaluate → finished

Every stage is made of rounds of one form: announce, collect one update per device, close, aggregate. The shell
(`trainer_server.service`) does MQTT, clock and disk. `now` is unix seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from protocol.bundle import Bundle
from protocol.errors import MessageError
from protocol.head import head_along, head_of_class_means
from protocol.layout import Layout, Vector
from protocol.messages import Ack, DeviceStatus, Globals, Round, Sal, Stage, Update, Verdict
from protocol.sal import SalState, first_level, observe
from protocol.tensors import Tensors, blob_hash, pack
from trainer_server.aggregation import weighted_average, weighted_mean
from trainer_server.config import Head, RunConfig
from trainer_server.events import (
    Announce,
    Command,
    Event,
    Note,
    PublishGlobals,
    Record,
    Reply,
    StatusSeen,
    Stop,
    UpdateSeen,
)


@dataclass(frozen=True)
class Contribution:
    update: Update
    tensors: Tensors
    size: int


@dataclass(frozen=True)
class Step:
    """Round `index` of the `of` rounds of a stage."""

    stage: Stage
    index: int
    of: int


@dataclass(frozen=True)
class Plan:
    """What does not change during a run."""

    config: RunConfig
    bundle: Bundle
    session: str

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


@dataclass(frozen=True)
class State:
    """`position` in the schedule, -1 while devices are gathering. `expert` (P,) is of the bundle's highest level, its
    blocks above SAL's level untrained; `start` (P₁,) is what stage 1 starts from, `gate` (G,) the gate adapter."""

    expert: Vector
    gate: Vector
    start: Vector
    sal: SalState
    since: float
    position: int = -1
    round: int = 0
    repeats: int = 0
    announced: Round | None = None
    devices: Mapping[str, DeviceStatus] = field(default_factory=dict)
    expected: frozenset[str] = frozenset()
    updates: Mapping[str, Contribution] = field(default_factory=dict)
    accepted: frozenset[tuple[int, str]] = frozenset()

    @property
    def online(self) -> frozenset[str]:
        return frozenset(name for name, status in self.devices.items() if status.online)


def initial_state(plan: Plan, now: float) -> State:
    expert, gate = plan.bundle.initial()
    sal = SalState(level=first_level(plan.config.stage1_sal))
    return State(expert=expert, gate=gate, start=np.empty(0, np.float32), sal=sal, since=now)


def advance(plan: Plan, state: State, event: Event, now: float) -> tuple[State, list[Command]]:
    """The next state, and what the shell has to do, in order."""
    commands: list[Command] = []
    if isinstance(event, StatusSeen):
        state = _see_device(plan, state, event.status, commands)
    elif isinstance(event, UpdateSeen):
        state = _see_update(plan, state, event, commands)
    if state.announced is None:
        return _maybe_start(plan, state, now, commands)
    complete = len(state.updates) >= plan.config.min_updates and state.expected <= set(state.updates)
    if complete or now >= _deadline(plan, state):
        return _close(plan, state, state.announced, now, commands)
    return state, commands


def next_deadline(plan: Plan, state: State) -> float:
    """When a ClockTicked is due at the latest."""
    if state.announced is None:
        return state.since + plan.config.join_timeout
    return _deadline(plan, state)


def _deadline(plan: Plan, state: State) -> float:
    return state.since + plan.config.round_timeout


def _see_device(plan: Plan, state: State, status: DeviceStatus, commands: list[Command]) -> State:
    if status.online and status.bundle != plan.bundle.sha256:
        commands.append(Note(f"{status.device} has another bundle ({status.bundle[:12]}…) and is left out"))
        status = status.model_copy(update={"online": False})
    before = state.devices.get(status.device)
    if status.error and (before is None or before.error != status.error):
        commands.append(Note(f"{status.device} cannot take part: {status.error}"))
    elif before is None or before.online != status.online:
        commands.append(Note(f"{status.device} is {'online' if status.online else 'offline'}"))
    return replace(state, devices={**state.devices, status.device: status})


def _see_update(plan: Plan, state: State, event: UpdateSeen, commands: list[Command]) -> State:
    update = event.update
    verdict, reason = _judge(plan, state, update, event.tensors)
    ack = Ack(
        run=update.run,
        session=update.session,
        round=update.round,
        device=update.device,
        verdict=verdict,
        reason=reason,
    )
    commands.append(Reply(ack))
    if verdict is Verdict.REJECTED:
        commands.append(Note(f"update of {update.device} for round {update.round} rejected: {reason}"))
    if verdict is not Verdict.ACCEPTED:
        return state
    contribution = Contribution(update, event.tensors, event.size)
    return replace(
        state,
        updates={**state.updates, update.device: contribution},
        accepted=state.accepted | {(update.round, update.device)},
    )


def _judge(plan: Plan, state: State, update: Update, tensors: Tensors) -> tuple[Verdict, str]:
    if update.run != plan.config.run:
        return Verdict.REJECTED, f"belongs to run {update.run!r}, this is {plan.config.run!r}"
    if update.session != plan.session:
        return Verdict.REJECTED, "belongs to an earlier run of this name"
    if (update.round, update.device) in state.accepted:
        return Verdict.DUPLICATE, "already counted"
    if state.announced is None or update.round > state.round:
        return Verdict.REJECTED, f"round {update.round} has not been announced"
    if update.round < state.round:
        return Verdict.LATE, f"round {update.round} is closed, the present one is {state.round}"
    if update.stage is not state.announced.stage:
        return Verdict.REJECTED, f"stage {update.stage.value}, announced was {state.announced.stage.value}"
    try:
        _check_tensors(plan, state.announced, tensors)
    except MessageError as error:
        return Verdict.REJECTED, str(error)
    return Verdict.ACCEPTED, ""


def _check_tensors(plan: Plan, announced: Round, tensors: Tensors) -> None:
    """Raises MessageError unless the tensors are what the round asks for, in name, shape, dtype and finiteness."""
    stage = announced.stage
    if stage is Stage.GLOBAL:
        if "classifier.weight" not in tensors:
            raise MessageError("the update holds no classifier")
        if plan.bundle.expert.join(tensors).size > plan.bundle.expert.size(announced.level):
            raise MessageError(f"the update holds blocks above level {announced.level}")
    elif stage is Stage.PERSONAL:
        _whole(plan.bundle.gate, tensors)
    elif stage is Stage.STATISTICS:
        _whole(_statistics_layout(plan.bundle), tensors)
    elif tensors:
        raise MessageError(f"stage {stage.value} takes no tensors")


def _whole(layout: Layout, tensors: Tensors) -> Vector:
    if len(tensors) != len(layout.slots):
        raise MessageError(f"the update holds {len(tensors)} tensors, expected {len(layout.slots)}")
    return layout.join(tensors)


def _statistics_layout(bundle: Bundle) -> Layout:
    dims = bundle.manifest.dims
    return Layout.build(
        [
            ("statistics", "class_sums", (dims.classes, dims.feature)),
            ("statistics", "class_counts", (dims.classes,)),
            ("statistics", "norm_sum", (1,)),
        ]
    )


def _maybe_start(plan: Plan, state: State, now: float, commands: list[Command]) -> tuple[State, list[Command]]:
    ready, timed_out = len(state.online), now >= state.since + plan.config.join_timeout
    if ready >= plan.config.devices or (timed_out and ready >= plan.config.min_updates):
        return _open(plan, state, 0, now, commands)
    if timed_out:
        wanted = plan.config.min_updates
        error = f"{ready} devices joined within {plan.config.join_timeout:.0f} s, at least {wanted} are needed"
        return state, [*commands, Stop(error)]
    return state, commands


def _open(plan: Plan, state: State, position: int, now: float, commands: list[Command]) -> tuple[State, list[Command]]:
    """Publishes what a round of the schedule needs and announces it."""
    config, number, step = plan.config, state.round + 1, plan.schedule[position]
    stage = step.stage
    hashes = {"expert": "", "start": "", "gate": ""}
    if stage is not Stage.STATISTICS:
        for kind, tensors in _globals(plan, state).items():
            blob = pack(Globals(run=config.run, kind=kind), tensors)
            hashes[kind] = blob_hash(blob)
            commands.append(PublishGlobals(hashes[kind], blob))
    announced = Round(
        run=config.run,
        session=plan.session,
        round=number,
        stage=stage,
        index=step.index,
        of=step.of,
        level=state.sal.level,
        seconds=config.round_timeout,
        expert=hashes["expert"],
        start=hashes["start"],
        gate=hashes["gate"],
        repetitions=config.stage1_rounds if stage is Stage.BASELINE else 1,
        training=config.stage2 if stage is Stage.PERSONAL else config.stage1,
        sal=_sal_of(plan, state, stage),
    )
    commands.append(Announce(announced))
    opened = replace(
        state,
        position=position,
        round=number,
        announced=announced,
        since=now,
        expected=state.online,
        updates={},
    )
    return opened, commands


def _sal_of(plan: Plan, state: State, stage: Stage) -> Sal:
    """The rule of a stage. After stage 1 nobody activates more blocks than the global expert has."""
    config = plan.config
    if stage in (Stage.STATISTICS, Stage.GLOBAL):
        return config.stage1_sal
    rule = config.stage2_sal if stage is Stage.PERSONAL else config.stage1_sal
    return rule.model_copy(update={"max_level": state.sal.level})


def _globals(plan: Plan, state: State) -> dict[str, Tensors]:
    """What devices are told: the global expert at its level, the expert it started from, the gate adapter."""
    expert = state.expert[: plan.bundle.expert.size(state.sal.level)]
    return {
        "expert": plan.bundle.expert.split(expert),
        "start": plan.bundle.expert.split(state.start),
        "gate": plan.bundle.gate.split(state.gate),
    }


def _close(
    plan: Plan, state: State, closing: Round, now: float, commands: list[Command]
) -> tuple[State, list[Command]]:
    """Aggregates what has come and opens the next round, or repeats this one."""
    too_few = len(state.updates) < plan.config.min_updates
    commands.append(
        Record(
            round=closing,
            seconds=now - state.since,
            updates={name: c.update for name, c in sorted(state.updates.items())},
            bytes_up={name: c.size for name, c in sorted(state.updates.items())},
            missing=tuple(sorted(state.expected - set(state.updates))),
            repeated=too_few,
        )
    )
    finish = len(plan.schedule) - 1
    if too_few:
        reason = f"round {state.round} got {len(state.updates)} updates, fewer than {plan.config.min_updates}"
        if state.repeats == plan.config.max_repeats:
            state, commands = _open(plan, state, finish, now, commands)
            return state, [*commands, Stop(f"{reason}, {state.repeats + 1} times in a row; the run is given up")]
        commands.append(Note(f"{reason}: repeated"))
        return _open(plan, replace(state, repeats=state.repeats + 1), state.position, now, commands)
    state = replace(_aggregate(plan, state, closing), repeats=0)
    state, commands = _open(plan, state, state.position + 1, now, commands)
    return state, [*commands, Stop()] if state.position == finish else commands


def _aggregate(plan: Plan, state: State, closing: Round) -> State:
    """What the updates of a closed round change. They are taken in the devices' order, whatever order they came in."""
    contributions = [state.updates[name] for name in sorted(state.updates)]
    layout = plan.bundle.expert
    if closing.stage is Stage.STATISTICS:
        head = _first_head(plan, _statistics_layout(plan.bundle).split(_sum_of(plan, contributions)))
        expert = state.expert.copy()
        expert[: head.size] = head
        return replace(state, expert=expert, start=expert[: layout.size(1)])
    if closing.stage is Stage.GLOBAL:
        vectors = [(layout.join(c.tensors), float(c.update.samples)) for c in contributions]
        accuracy = weighted_average(
            [(c.update.metrics.get("held_out_global", 0.0), float(c.update.samples)) for c in contributions]
        )
        # after the last round nothing would train a newly activated block
        last = closing.index + 1 == closing.of
        sal = state.sal if last else observe(plan.config.stage1_sal, state.sal, accuracy)
        return replace(state, expert=weighted_mean(state.expert, layout, vectors), sal=sal)
    if closing.stage is Stage.PERSONAL:
        gates = [(plan.bundle.gate.join(c.tensors), float(c.update.samples)) for c in contributions]
        return replace(state, gate=weighted_mean(state.gate, plan.bundle.gate, gates))
    return state


def _first_head(plan: Plan, sums: Mapping[str, Vector]) -> Vector:
    """The head, flat, that stage 1 starts from, after all devices' statistics."""
    counts, norm_sum = sums["class_counts"], float(sums["norm_sum"][0])
    if plan.config.head is Head.CLASS_MEANS:
        return head_of_class_means(sums["class_sums"], counts, norm_sum)
    if plan.config.head is Head.ZEROS:
        return np.zeros(plan.bundle.expert.size(0), np.float32)
    zero_shot = plan.bundle.zero_shot()
    assert zero_shot is not None  # or the run would not have been started
    return head_along(zero_shot.rows, zero_shot.scale, counts, norm_sum)


def _sum_of(plan: Plan, contributions: list[Contribution]) -> Vector:
    layout = _statistics_layout(plan.bundle)
    total: NDArray[np.float64] = np.zeros(layout.total)
    for contribution in contributions:
        total += layout.join(contribution.tensors)
    return np.asarray(total, np.float32)
