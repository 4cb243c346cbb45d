"""A run as a state machine without I/O: `advance(plan, state, event, now) -> (state, commands)`.

    gather → statistics → global × n → [head] → personal × m → [baseline] → evaluate → finished

With secure sums, statistics and head are several rounds each (see `fedfmsl.protocol.secure_sums`).

All rounds have the same form: announce, collect one update per device, close, apply. A round closes when enough devices
have answered or at its deadline, whichever is first. It is repeated if too few updates came. The I/O loop
(`trainer_server.service.loop`) does MQTT, clock and disk. `now` is in seconds of the run's own clock, which counts only
while a server runs. So no round closes because the system time changes or the server is down.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.sal import Sal
from fedfmsl.algorithms.secure_aggregation import MIN_DEVICES, SecureAggregationError
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import EXCHANGE, Ack, DeviceStatus, Globals, Round, Stage, Verdict
from fedfmsl.protocol.secure_sums import SHARES
from fedfmsl.protocol.tensors import blob_hash, pack
from trainer_server.config import MAX_DEVICES
from trainer_server.coordinator.events import (
    AnnounceRound,
    Command,
    CountRefusal,
    Event,
    Log,
    PublishGlobals,
    SendAck,
    StatusSeen,
    Stop,
    StoreRound,
    UpdateSeen,
)
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.round_update import apply_round, without_sums
from trainer_server.coordinator.secure_sums import MAX_REPEATS, asked_devices, shortage
from trainer_server.coordinator.selection import devices_in_share, select_devices
from trainer_server.coordinator.state import SUMS, TRAINING, Accepted, Plan, State, Step
from trainer_server.coordinator.validation import validate_update

Blobs = dict[str, tuple[str, bytes]]  # kind of globals → SHA-256 and blob

REMEMBERED_ROUNDS = 2  # updates of older rounds are reported as late, also if they were accepted before


def advance(plan: Plan, state: State, event: Event, now: float) -> tuple[State, list[Command]]:
    """The next state, and the commands for the I/O loop in order."""
    if isinstance(event, StatusSeen):
        return _receive_status(plan, state, event.status)
    if isinstance(event, UpdateSeen):
        return _receive_update(plan, state, event)
    if state.announced is None:
        return _maybe_start(plan, state, now)
    if is_complete(plan, state, state.announced) or now >= next_deadline(plan, state):
        return _close_round(plan, state, state.announced, now)
    return state, []


def next_deadline(plan: Plan, state: State) -> float:
    """The latest time for the next ClockTicked."""
    return state.since + (plan.config.join_timeout if state.announced is None else plan.config.round_timeout)


def is_complete(plan: Plan, state: State, announced: Round) -> bool:
    """Whether enough devices have answered: selected ones only, or all if late updates count."""
    share = plan.config.enough if announced.stage in TRAINING else 1.0
    answers = len(state.updates) if plan.config.max_staleness else len(state.answered & state.expected)
    wanted = devices_in_share(share, len(state.awaited))
    return len(state.updates) >= plan.config.min_updates and answers >= wanted


def _receive_status(plan: Plan, state: State, status: DeviceStatus) -> tuple[State, list[Command]]:
    before = state.devices.get(status.device)
    if before is None and len(state.devices) >= MAX_DEVICES:
        return state, [CountRefusal(status.device, "too many devices", f"more than {MAX_DEVICES} devices")]
    stale = before is not None and not status.online and status.instance != before.instance
    known = before is not None and bool(before.error) and not (before.online or status.online or status.error)
    if stale or known:  # the last will of an earlier process, or of one that has said why it ends
        return state, []
    commands: list[Command] = []
    if status.online and status.bundle != plan.bundle.sha256:
        error = f"it has another bundle ({status.bundle[:12]}…)"
        status = status.model_copy(update={"online": False, "error": error})
    if status == before:
        return state, []
    if status.error:
        if before is None or not before.error:  # later texts explain the same error
            commands.append(Log(f"{status.device} cannot take part: {status.error}"))
    elif before is None or before.online != status.online or before.error:
        commands.append(Log(f"{status.device} is {'online' if status.online else 'offline'}"))
    elif bool(before.paused) != bool(status.paused):
        commands.append(Log(f"{status.device} {f'paused: {status.paused}' if status.paused else 'resumes'}"))
    return replace(state, devices={**state.devices, status.device: status}), commands


def _receive_update(plan: Plan, state: State, event: UpdateSeen) -> tuple[State, list[Command]]:
    update = event.update
    validation = validate_update(plan, state, update, event.tensors)
    ack = Ack(
        run=update.run,
        session=update.session,
        round=update.round,
        device=update.device,
        verdict=validation.verdict,
        reason=validation.reason,
    )
    if validation.verdict is not Verdict.ACCEPTED:
        about = f"update for round {update.round}: {validation.reason}"
        return state, [SendAck(ack), CountRefusal(update.device, validation.kind, about)]
    key = (update.round, update.device)
    accepted = Accepted(update, event.sha256, event.size)
    state = replace(state, updates={**state.updates, key: accepted}, counted=state.counted | {key})
    return state, [SendAck(ack)]


def _maybe_start(plan: Plan, state: State, now: float) -> tuple[State, list[Command]]:
    ready, timed_out = len(state.online), now >= next_deadline(plan, state)
    if ready >= plan.config.devices or (timed_out and ready >= plan.config.min_updates):
        return _open_round(plan, state, 0, now)
    if timed_out:
        least = plan.config.min_updates
        count = f"{ready} device{'' if ready == 1 else 's'}"
        error = (
            f"{count} joined within {plan.config.join_timeout:.0f} s, at least {least} must; check that devices use "
            f"--run {plan.config.run} and this broker, or raise --join-timeout"
        )
        return state, [Stop(error)]
    return state, []


def _open_round(plan: Plan, state: State, position: int, now: float) -> tuple[State, list[Command]]:
    """Selects devices, publishes the globals and announces the round at `position` of the schedule."""
    config, number, step = plan.config, state.round + 1, plan.schedule[position]
    stage, level = step.stage, state.sal.level
    if step.sums is not None and position == plan.part_of(step.sums).start and len(state.ready) < MIN_DEVICES:
        reason = f"{len(state.ready)} devices are online, and secure sums need {MIN_DEVICES}"
        return _skip_sums(plan, state, step.sums, reason, now)
    selected = _selected(plan, state, step, number)
    oldest = number - max(config.max_staleness, REMEMBERED_ROUNDS)
    closed = [*state.recent, *([state.announced] if state.announced else [])]
    blobs = pack_globals(plan, state, stage)
    announced = Round(
        run=config.run,
        session=plan.session,
        round=number,
        stage=stage,
        index=step.index,
        of=step.of,
        level=level,
        chosen=tuple(sorted(selected)) if selected != state.ready or step.sums is not None else (),
        repetitions=config.stage1_rounds if stage is Stage.BASELINE else 1,
        training=config.stage2 if stage is Stage.PERSONAL else config.stage1,
        sal=_sal_of(plan, state, stage),
        encoding=config.encoding,
        privacy=config.privacy,
        min_class_count=config.min_class_count if step.sums is not None else 0,
        classes=state.secure.classes if stage in SUMS else (),
        **{kind: sha256 for kind, (sha256, _) in blobs.items()},
    )
    state = replace(
        state,
        position=position,
        round=number,
        announced=announced,
        since=now,
        expected=selected,
        updates={},
        recent=tuple(closed[len(closed) - config.max_staleness :]) if config.max_staleness else (),
        counted=frozenset(key for key in state.counted if key[0] >= oldest),
    )
    return state, _announce(blobs, announced)


def _selected(plan: Plan, state: State, step: Step, number: int) -> frozenset[str]:
    """The devices that the round asks. A repeated round of training asks every device, because the same selection could
    fail again."""
    if step.sums is not None:
        return asked_devices(plan, state, step.stage)
    if step.stage not in TRAINING or state.repeats:
        return state.ready
    ready = {name: state.devices[name] for name in state.ready}
    return select_devices(plan.config, ready, state.sal.level, number)


def announcement(plan: Plan, state: State, announced: Round) -> list[Command]:
    """Publishes the present round again, after a restart or for a broker that lost its retained messages."""
    return _announce(pack_globals(plan, state, announced.stage), announced)


def _announce(blobs: Blobs, announced: Round) -> list[Command]:
    return [*(PublishGlobals(sha256, blob) for sha256, blob in blobs.values()), AnnounceRound(announced)]


def pack_globals(plan: Plan, state: State, stage: Stage) -> Blobs:
    """The globals by kind: the global expert at its level, the expert that stage 1 started from, the gate adapter; in
    the rounds of secure sums also keys and shares. Before stage 1 there are no experts."""
    tensors: dict[str, Tensors] = {}
    if state.start.size:
        tensors = {
            "expert": plan.bundle.expert.split(state.expert[: plan.bundle.expert.size(state.sal.level)]),
            "start": plan.bundle.expert.split(state.start),
            "gate": plan.bundle.gate.split(state.gate),
        }
    if state.secure.roster and stage is not Stage.KEYS:
        tensors["roster"] = state.secure.roster
        if stage is Stage.UNMASK:
            tensors["shares"] = {SHARES: state.secure.shares}
    blobs = {kind: pack(Globals(run=plan.config.run, kind=kind), named) for kind, named in tensors.items()}
    return {kind: (blob_hash(blob), blob) for kind, blob in blobs.items()}


def _sal_of(plan: Plan, state: State, stage: Stage) -> Sal:
    """The stage's rule. After stage 1 no device activates more blocks than the global expert has."""
    config = plan.config
    if stage in (Stage.STATISTICS, Stage.GLOBAL, Stage.HOLDERS, *EXCHANGE):
        return config.stage1_sal
    rule = config.stage2_sal if stage is Stage.PERSONAL else config.stage1_sal
    return replace(rule, max_level=state.sal.level)


def _close_round(plan: Plan, state: State, closing: Round, now: float) -> tuple[State, list[Command]]:
    """Applies the updates and opens the next round, or repeats this one."""
    config, finish, step = plan.config, len(plan.schedule) - 1, plan.schedule[state.position]
    too_few = ""
    if len(state.updates) < config.min_updates:
        too_few = f"round {state.round} got {len(state.updates)} updates, fewer than {config.min_updates}"
    elif step.sums is not None:
        too_few = shortage(plan, state, closing)
    record = _record(state, closing, now, too_few)
    if not too_few:
        try:
            applied = apply_round(plan, state, closing)
        except (SecureAggregationError, MessageError) as error:
            assert step.sums is not None
            state, commands = _skip_sums(plan, state, step.sums, str(error), now)
            return state, [record, *commands]
        position = state.position + 1
        # repeats of all rounds of secure sums count together
        repeats = state.repeats if step.sums is not None and plan.schedule[position].sums is step.sums else 0
        state, commands = _open_round(plan, replace(applied, repeats=repeats), position, now)
        return state, [record, *commands, *([Stop()] if state.position == finish else [])]
    if step.sums is not None:
        state, commands = _repeat_sums(plan, state, step.sums, too_few, now)
        return state, [record, *commands]
    if config.max_repeats is not None and state.repeats >= config.max_repeats:
        times = f"{state.repeats + 1} times in a row"
        state, commands = _open_round(plan, state, finish, now)
        return state, [record, *commands, Stop(f"{too_few}, {times}; the run ends")]
    state, commands = _open_round(plan, replace(state, repeats=state.repeats + 1), state.position, now)
    return state, [record, Log(f"{too_few}; repeating it"), *commands]


def _repeat_sums(plan: Plan, state: State, sums: Stage, reason: str, now: float) -> tuple[State, list[Command]]:
    """Starts secure sums again, with fresh keys; once masks may have been removed, repeats only their removal."""
    stage = plan.schedule[state.position].stage
    if stage in SUMS or state.repeats >= MAX_REPEATS:
        return _skip_sums(plan, state, sums, reason, now)
    position = state.position if stage is Stage.UNMASK else plan.part_of(sums).start
    state, commands = _open_round(plan, replace(state, repeats=state.repeats + 1), position, now)
    return state, [Log(f"{reason}; repeating it"), *commands]


def _skip_sums(plan: Plan, state: State, sums: Stage, reason: str, now: float) -> tuple[State, list[Command]]:
    """Goes on without the secure sums of a stage."""
    without = "stage 1 starts from the bundle's own head"
    if sums is Stage.HEAD:
        without = "the global expert keeps the head of stage 1"
    state = replace(without_sums(plan, state, sums), repeats=0)
    state, commands = _open_round(plan, state, plan.part_of(sums).stop, now)
    return state, [Log(f"no secure sums: {reason}; {without}"), *commands]


def _record(state: State, closing: Round, now: float, repeated: str) -> StoreRound:
    """The record of a round.

    If late updates count, a device may have several: the record has the newest one, and the bytes of all.
    """
    in_order = [state.updates[key] for key in sorted(state.updates)]
    bytes_up: Counter[str] = Counter()
    for accepted in in_order:
        bytes_up[accepted.update.device] += accepted.size
    closed = ClosedRound(
        round=closing,
        seconds=now - state.since,
        updates={accepted.update.device: accepted.update for accepted in in_order},
        bytes_up=dict(bytes_up),
        missing=tuple(sorted(state.expected - state.answered)),
        repeated=repeated,
    )
    return StoreRound(closed)
