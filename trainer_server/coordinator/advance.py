"""A run as a state machine without I/O: `advance(plan, state, event, now) -> (state, commands)`.

    gather → statistics → global × n → [head] → personal × m → [baseline] → evaluate → finished

All rounds have the same form: announce, collect one update per device, close, apply. A round closes when enough devices
have answered or at its deadline, whichever is first. If too few updates came, it lasts longer while devices are at
work, up to a limit, and is repeated otherwise. The I/O loop (`trainer_server.service.loop`) does MQTT, clock and disk.
`now` is in seconds of the run's own clock, which counts only while a server runs. So no round closes because the system
time changes or the server is down.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.sal import Sal
from fedfmsl.protocol.messages import Ack, DeviceStatus, Globals, Round, Stage, Verdict
from fedfmsl.protocol.tensors import blob_hash, pack
from trainer_server.config import MAX_DEVICES
from trainer_server.coordinator.events import (
    AnnounceRound,
    Command,
    CountRefusal,
    Event,
    LimitsChanged,
    Log,
    PublishGlobals,
    SendAck,
    StatusSeen,
    Stop,
    StoreRound,
    UpdateRefused,
    UpdateSeen,
)
from trainer_server.coordinator.limits import MAX_STRETCH, UNMERGED, devices_in_share, round_seconds
from trainer_server.coordinator.records import ClosedRound, listed
from trainer_server.coordinator.refusals import LEFT_OUT_AFTER, LEFT_OUT_ROUNDS, refuse
from trainer_server.coordinator.round_update import apply_round
from trainer_server.coordinator.selection import eligible_devices, select_devices
from trainer_server.coordinator.state import TRAINING, Accepted, Plan, State
from trainer_server.coordinator.validation import validate_update

Blobs = dict[str, tuple[str, bytes]]  # kind of globals → SHA-256 and blob

RAISE_TIMEOUT = "If this repeats, stop the server and resume with a longer --round-timeout"
REMEMBERED_ROUNDS = 2  # updates of older rounds are reported as late, also if they were accepted before


def advance(plan: Plan, state: State, event: Event, now: float) -> tuple[State, list[Command]]:
    """The next state, and the commands for the I/O loop in order."""
    if isinstance(event, StatusSeen):
        return _receive_status(plan, state, event.status)
    if isinstance(event, UpdateSeen):
        return _receive_update(plan, state, event, now)
    if isinstance(event, UpdateRefused):
        return _refuse(state, event.device)
    if isinstance(event, LimitsChanged):
        changes = [Log(text) for text in state.limits.differences(event.limits)]
        return (replace(state, limits=event.limits), [*changes]) if changes else (state, [])
    if state.announced is None:
        return _maybe_start(plan, state, now)
    if is_complete(plan, state, state.announced):
        return _close_round(plan, state, state.announced, now)
    if now >= next_deadline(plan, state):
        return _end_of_time(plan, state, state.announced, event.working, now)
    return state, []


def next_deadline(plan: Plan, state: State) -> float:
    """The latest time for the next ClockTicked."""
    announced = state.announced
    if announced is None:
        return state.since + plan.config.join_timeout
    return state.since + round_seconds(state.limits, announced, state.stretch, state.slowest)


def is_complete(plan: Plan, state: State, announced: Round) -> bool:
    """Whether enough devices have answered: selected ones only, or all if late updates count."""
    share = state.limits.enough if announced.stage in TRAINING else 1.0
    answers = len(state.updates) if plan.config.max_staleness else len(state.answered & state.expected)
    wanted = devices_in_share(share, len(state.awaited))
    return len(state.updates) >= state.limits.min_updates and answers >= wanted


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


def _receive_update(plan: Plan, state: State, event: UpdateSeen, now: float) -> tuple[State, list[Command]]:
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
        replies: list[Command] = [SendAck(ack), CountRefusal(update.device, validation.kind, about)]
        here = (update.run, update.session, update.round) == (plan.config.run, plan.session, state.round)
        if here and validation.verdict is Verdict.REJECTED:
            state, commands = _refuse(state, update.device)
            replies += commands
        return state, replies
    key = (update.round, update.device)
    accepted = Accepted(update, event.sha256, event.size)
    state = replace(
        state,
        updates={**state.updates, key: accepted},
        counted=state.counted | {key},
        refused={name: refused for name, refused in state.refused.items() if name != update.device},
    )
    if update.round == state.round and update.stage not in UNMERGED:
        seconds = max(state.slowest.get(update.stage, 0.0), now - state.since)
        state = replace(state, slowest={**state.slowest, update.stage: seconds})
    return state, [SendAck(ack)]


def _refuse(state: State, device: str) -> tuple[State, list[Command]]:
    """After a refused update for the present round. It counts against selected devices only."""
    before = state.refused.get(device)
    refused = refuse(before, state.round)
    if device not in state.expected or refused == before:
        return state, []
    commands: list[Command] = []
    if refused.times >= LEFT_OUT_AFTER:
        about = f"its updates were refused in {refused.times} rounds in a row; see its log and the server's status"
        commands = [Log(f"{device} is left out of the next {LEFT_OUT_ROUNDS} rounds: {about}", warning=True)]
    return replace(state, refused={**state.refused, device: refused}), commands


def _maybe_start(plan: Plan, state: State, now: float) -> tuple[State, list[Command]]:
    ready, timed_out, least = len(state.online), now >= next_deadline(plan, state), state.limits.min_updates
    if ready >= plan.config.devices:
        return _open_round(plan, state, 0, now)
    if timed_out and ready >= least:
        state, commands = _open_round(plan, state, 0, now)
        joined = f"only {ready} of {plan.config.devices} devices joined within {plan.config.join_timeout:.0f} s"
        return state, [Log(f"{joined}; the run starts without the others", warning=True), *commands]
    if timed_out:
        count = f"{ready} device{'' if ready == 1 else 's'}"
        error = (
            f"{count} joined within {plan.config.join_timeout:.0f} s, at least {least} must (--min-updates); check "
            f"that devices use --run {plan.config.run} and this broker, or raise --join-timeout"
        )
        return state, [Stop(error)]
    return state, []


def _open_round(plan: Plan, state: State, position: int, now: float) -> tuple[State, list[Command]]:
    """Selects devices, publishes the globals and announces the round at `position` of the schedule."""
    config, number, step = plan.config, state.round + 1, plan.schedule[position]
    stage, level = step.stage, state.sal.level
    least = state.limits.min_updates
    ready = {name: state.devices[name] for name in state.ready}
    eligible = eligible_devices(ready, state.refused, number, least)
    # a repeated round asks every device, because the same selection could fail again
    selects = stage in TRAINING and not state.repeats
    selected = select_devices(config, eligible, level, number, least) if selects else frozenset(eligible)
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
        chosen=tuple(sorted(selected)) if selected != state.ready else (),
        repetitions=config.stage1_rounds if stage is Stage.BASELINE else 1,
        training=config.stage2 if stage is Stage.PERSONAL else config.stage1,
        sal=_sal_of(plan, state, stage),
        encoding=config.encoding,
        privacy=config.privacy,
        **{kind: sha256 for kind, (sha256, _) in blobs.items()},
    )
    state = replace(
        state,
        position=position,
        round=number,
        announced=announced,
        since=now,
        stretch=1 if stage in UNMERGED else state.stretch,  # their deadline follows measured time
        expected=selected,
        updates={},
        recent=tuple(closed[len(closed) - config.max_staleness :]) if config.max_staleness else (),
        counted=frozenset(key for key in state.counted if key[0] >= oldest),
    )
    return state, _announce(blobs, announced)


def announcement(plan: Plan, state: State, announced: Round) -> list[Command]:
    """Publishes the present round again, after a restart or for a broker that lost its retained messages."""
    return _announce(pack_globals(plan, state, announced.stage), announced)


def _announce(blobs: Blobs, announced: Round) -> list[Command]:
    return [*(PublishGlobals(sha256, blob) for sha256, blob in blobs.values()), AnnounceRound(announced)]


def pack_globals(plan: Plan, state: State, stage: Stage) -> Blobs:
    """The globals by kind: the global expert at its level, the expert that stage 1 started from, the gate adapter.
    Empty before the statistics round."""
    if stage is Stage.STATISTICS:
        return {}
    tensors: dict[str, Tensors] = {
        "expert": plan.bundle.expert.split(state.expert[: plan.bundle.expert.size(state.sal.level)]),
        "start": plan.bundle.expert.split(state.start),
        "gate": plan.bundle.gate.split(state.gate),
    }
    blobs = {kind: pack(Globals(run=plan.config.run, kind=kind), named) for kind, named in tensors.items()}
    return {kind: (blob_hash(blob), blob) for kind, blob in blobs.items()}


def _sal_of(plan: Plan, state: State, stage: Stage) -> Sal:
    """The stage's rule. After stage 1 no device activates more blocks than the global expert has."""
    config = plan.config
    if stage in (Stage.STATISTICS, Stage.GLOBAL):
        return config.stage1_sal
    rule = config.stage2_sal if stage is Stage.PERSONAL else config.stage1_sal
    return replace(rule, max_level=state.sal.level)


def _end_of_time(
    plan: Plan, state: State, announced: Round, working: frozenset[str], now: float
) -> tuple[State, list[Command]]:
    """At the deadline. A round with too few updates gets twice the time while awaited devices are `working`: if it were
    repeated, their work would be lost, and the repeated round would take as long."""
    busy = sorted(working & state.awaited - state.answered)
    after = f"{next_deadline(plan, state) - state.since:.0f} s"
    if len(state.updates) >= state.limits.min_updates or not busy or state.stretch >= MAX_STRETCH:
        state, commands = _close_round(plan, state, announced, now)
        if busy:
            late = f"round {announced.round}: still at work after {after}: {listed(busy)}; {RAISE_TIMEOUT}"
            commands = [Log(late, warning=True), *commands]
        return state, commands
    seconds = next_deadline(plan, state := replace(state, stretch=2 * state.stretch)) - state.since
    text = (
        f"round {announced.round} has {len(state.updates)} of at least {state.limits.min_updates} updates after "
        f"{after}; still at work: {listed(busy)}; it lasts up to {seconds:.0f} s now. {RAISE_TIMEOUT}"
    )
    return state, [Log(text, warning=True)]


def _close_round(plan: Plan, state: State, closing: Round, now: float) -> tuple[State, list[Command]]:
    """Applies the updates and opens the next round, or repeats this one."""
    limits, finish = state.limits, len(plan.schedule) - 1
    too_few = ""
    if len(state.updates) < limits.min_updates:
        too_few = f"round {state.round} got {len(state.updates)} updates, fewer than {limits.min_updates}"
    record = _record(state, closing, now, too_few)
    if not too_few:
        quick = 2 * (now - state.since) < next_deadline(plan, state) - state.since
        stretch = max(state.stretch // 2, 1) if quick else state.stretch
        state = replace(apply_round(plan, state, closing), repeats=0, stretch=stretch)
        state, commands = _open_round(plan, state, state.position + 1, now)
        return state, [record, *commands, *([Stop()] if state.position == finish else [])]
    if limits.max_repeats is not None and state.repeats >= limits.max_repeats:
        times = f"{state.repeats + 1} times in a row"
        state, commands = _open_round(plan, state, finish, now)
        return state, [record, *commands, Stop(f"{too_few}, {times}; the run ends")]
    state, commands = _open_round(plan, replace(state, repeats=state.repeats + 1, stretch=1), state.position, now)
    return state, [record, Log(f"{too_few}; repeating it", warning=True), *commands]


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
