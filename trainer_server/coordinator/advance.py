"""A run as a state machine without I/O: `advance(plan, state, event, now) -> (state, commands)`.

    gather → statistics → global × n → [head] → [canary] → personal × m → [baseline] → evaluate → finished

With secure aggregation, each of them is several rounds (see `fedfmsl.protocol.secure_sums`).

All rounds have the same form: announce, collect one update per device, close, apply. A round closes when enough devices
have answered or at its deadline, whichever is first. If too few updates came, it lasts longer while devices are at
work, up to a limit, and is repeated otherwise. The I/O loop (`trainer_server.service.loop`) does MQTT, clock and disk.
`now` is in seconds of the run's own clock, which counts only while a server runs. So no round closes because the system
time changes or the server is down.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from fedfmsl.algorithms.draw import lowest
from fedfmsl.algorithms.secure_aggregation import MIN_DEVICES, SecureAggregationError
from fedfmsl.common.persistent_map import PersistentMap
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import MAX_NAMED, Round, Stage
from trainer_server.config import MIN_REPORTS
from trainer_server.coordinator.adoption import canaries, rejection, with_last_good, with_verdict
from trainer_server.coordinator.announce import COUNTED, PERSONALIZING, announce, pack_globals, sal_of, sums_of
from trainer_server.coordinator.candidates import Rollback
from trainer_server.coordinator.events import (
    Command,
    Event,
    LimitsChanged,
    Log,
    OperatorActed,
    RestChanged,
    StatusSeen,
    Stop,
    StoreRound,
    UpdateRefused,
    UpdateSeen,
)
from trainer_server.coordinator.former_head import why_rejected
from trainer_server.coordinator.limits import MAX_STRETCH, UNMERGED, devices_in_share, round_seconds
from trainer_server.coordinator.operator import Action, Operation, act
from trainer_server.coordinator.receive import receive_status, receive_update, refuse_update, without_offline
from trainer_server.coordinator.records import ClosedRound, listed, number_of
from trainer_server.coordinator.refusals import (
    LEFT_OUT_SUMS,
    is_left_out,
    left_out_of_sums,
)
from trainer_server.coordinator.rollback import restart_position, rolled_back, why_no_rollback
from trainer_server.coordinator.round_update import (
    apply_round,
    left_out,
    newest_updates,
    scaled_down,
    suspects,
    with_former_head,
    without_sums,
)
from trainer_server.coordinator.secure_sums import MAX_REPEATS, asked_devices, secure_level, shortage
from trainer_server.coordinator.selection import announced_as, at_most, eligible_devices, select_devices
from trainer_server.coordinator.sessions import ending, prepares, why_no_classes, why_not_withdrawn
from trainer_server.coordinator.state import SUMS, TRAINING, Part, Plan, State, Step, after_hold, with_counted
from trainer_server.coordinator.waiting import fewest_updates, is_short, must_wait, needed_updates, reason, remedy

RAISE_TIMEOUT = "If this repeats, stop the server and resume with a longer --round-timeout"
WITHOUT = {  # what a run does without a secure aggregation
    Stage.STATISTICS: "stage 1 starts from the bundle's own head",
    Stage.HEAD: "the global expert keeps the head of stage 1",
    Stage.GLOBAL: "this round does not change the global expert",
    Stage.PERSONAL: "this round does not change the gate adapter",
}
REMEMBERED_ROUNDS = 2  # updates of older rounds are reported as late, also if they were accepted before


def advance(plan: Plan, state: State, event: Event, now: float) -> tuple[State, list[Command]]:
    """The next state, and the commands for the I/O loop in order."""
    if isinstance(event, StatusSeen):
        return receive_status(plan, state, event.status)
    if isinstance(event, UpdateSeen):
        return receive_update(plan, state, event, now)
    if isinstance(event, UpdateRefused):
        return refuse_update(state, event.device)
    if isinstance(event, LimitsChanged):
        changes = [Log(text) for text in state.limits.differences(event.limits)]
        if state.waiting and event.limits.max_repeats is not None:  # the run may end now instead
            state = replace(state, waiting=False, since=now if state.held_at is None else state.held_at)
        return (replace(state, limits=event.limits), [*changes]) if changes else (state, [])
    if isinstance(event, OperatorActed):
        if impossible := _why_not(plan, state, event.operation):
            return state, [Log(f"operator: {impossible}", warning=True)]
        state, text = act(state, event.operation, now)
        return state, [Log(text)]
    if isinstance(event, RestChanged):
        if event.rests == (state.rests_at is not None):
            return state, []
        return replace(state, rests_at=now) if event.rests else after_hold(state, "rests_at", now), []
    if state.held_at is not None:
        return state, []
    if state.rollback is not None:
        return _roll_back(plan, state, state.rollback, now)
    if state.announced is None:
        return _maybe_start(plan, state, event.wall, now)
    if state.closing == state.round or is_complete(plan, state, state.announced):
        return _close_round(plan, state, state.announced, now)
    if state.waiting:
        return (state, []) if is_short(plan, state) else _go_on(plan, state, state.announced, now)
    if now >= next_deadline(plan, state):
        return _end_of_time(plan, state, state.announced, event.working, now)
    return state, []


def _why_not(plan: Plan, state: State, operation: Operation) -> str:
    """Why an action of the operator is not possible, or "". Others are checked when they are carried out."""
    if operation.action is Action.ROLLBACK:
        return why_no_rollback(plan, state)
    if operation.action is Action.WITHDRAW:
        return why_not_withdrawn(plan, state, operation.classes)
    return why_no_classes(plan, state, operation.classes) if operation.action is Action.CLASSES else ""


def next_deadline(plan: Plan, state: State) -> float:
    """The latest time for the next ClockTicked. A run that is paused, rests or waits has none, and a later session has
    no time to join."""
    announced = state.announced
    if state.held_at is not None or state.waiting:
        return math.inf
    if announced is None:
        return state.since + plan.config.join_timeout if state.round == 0 else math.inf
    return state.since + round_seconds(state.limits, announced, state.stretch, state.slowest)


def is_complete(plan: Plan, state: State, announced: Round) -> bool:
    """Whether enough devices have answered: selected ones only, or all if late updates count. A share of the devices is
    not enough while it is too few for secure aggregation. If all have answered and are too few, a round of training
    waits for its deadline, because it is repeated without end; sums are soon given up."""
    share = state.limits.enough if announced.stage in TRAINING else 1.0
    if len(state.updates) < devices_in_share(share, len(state.expected) - len(state.unable)):
        return False  # without a look at each of ten thousand devices after every message
    answers = len(state.updates) if plan.config.max_staleness else len(state.answered & state.expected)
    if len(state.updates) < fewest_updates(plan, state) or answers < devices_in_share(share, len(state.awaited)):
        return False
    if not _too_few(plan, state, announced):
        return True
    part = plan.schedule[state.position].part
    return answers >= len(state.awaited) and part is not None and part[0] not in TRAINING


def _maybe_start(plan: Plan, state: State, wall: float, now: float) -> tuple[State, list[Command]]:
    """A later session does not wait for all devices, like a round. It waits for those with samples of an added class,
    and in a standing run for news."""
    if commands := ending(plan, state, 0):
        return state, commands
    timed_out, least = now >= next_deadline(plan, state), state.limits.min_updates
    wanted = plan.config.devices if state.round == 0 else least
    if (len(state.devices) < wanted or prepares(plan, state)) and not timed_out:
        return state, []
    if state.standing.needs_news and state.standing.lacks(state.limits, map(state.devices.__getitem__, state.ready)):
        return state, []
    begun = replace(state, standing=state.standing.opened(wall))
    ready = len(state.ready if state.round else state.online)
    if ready >= wanted:
        return _open_round(plan, begun, 0, now)
    if timed_out and ready >= least:
        state, commands = _open_round(plan, begun, 0, now)
        joined = f"only {ready} of {plan.config.devices} devices joined within {plan.config.join_timeout:.0f} s"
        return state, [Log(f"{joined}; the run starts without the others", warning=True), *commands]
    if timed_out:
        count = number_of(ready, "device")
        error = (
            f"{count} joined within {plan.config.join_timeout:.0f} s, at least {least} must (--min-updates); check "
            f"that devices use --run {plan.config.run} and this broker, or raise --join-timeout"
        )
        return state, [Stop(error)]
    return state, []


def _open_round(
    plan: Plan, state: State, position: int, now: float, is_end: bool = False
) -> tuple[State, list[Command]]:
    """Selects devices, publishes the globals and announces the round at `position` of the schedule; or ends the
    session instead, if it is not the end of the run."""
    if not is_end and (ends := ending(plan, state, position)):
        return state, ends
    state = without_offline(plan, state)
    config, number, step = plan.config, state.round + 1, plan.schedule[position]
    stage, level = step.stage, state.sal.level
    starts = step.part is None or position == plan.positions_of(step.part).start
    selected = _selected(plan, state, step, number)
    if step.part is not None:
        if starts and step.part[0] in SUMS and len(state.ready) < MIN_DEVICES:
            few = f"it needs {MIN_DEVICES} devices, and {len(state.ready)} can take part"
            return _skip_part(plan, state, step.part, few, now)
        if step.part[0] is Stage.GLOBAL:
            level = secure_level(state, selected) if starts else state.secure.level
    if stage is Stage.CANARY and not selected:
        able = "answer it" if state.repeats else "that are online have measured the last global expert"
        state, commands = _open_round(plan, replace(state, repeats=0), position + 1, now)
        return state, [Log(f"no canary round: fewer than {MIN_REPORTS} devices {able}", warning=True), *commands]
    oldest = number - max(config.max_staleness, REMEMBERED_ROUNDS)
    closed = [*state.recent, *([state.announced] if state.announced else [])]
    blobs = pack_globals(plan, state, stage)
    asked = announced_as(selected, state.ready, state.excluded, config.seed, number)
    if step.part is not None:  # the members of a secure aggregation are named
        asked = {"chosen": tuple(sorted(selected))}
    announced = Round(
        run=config.run,
        session=plan.session,
        round=number,
        stage=stage,
        index=step.index,
        of=step.of,
        level=level,
        repetitions={Stage.BASELINE: config.stage1_rounds, Stage.FINISHED: config.stage2_rounds}.get(stage, 1),
        training=config.stage2 if stage in PERSONALIZING else config.stage1,
        sal=sal_of(plan, state, stage),
        encoding=config.encoding,
        privacy=config.privacy,
        sums=sums_of(plan, state, stage),
        min_class_count=config.min_class_count if stage in COUNTED and config.privacy is None else 0,
        secure=step.part is not None,
        classes=state.secure.classes if stage in SUMS else (),
        **{**asked, **{kind: sha256 for kind, (sha256, _) in blobs.items()}},
    )
    state = replace(
        state,
        position=position,
        round=number,
        announced=announced,
        since=now,
        waiting=False,
        stretch=1 if stage in UNMERGED else state.stretch,  # their deadline follows measured time
        expected=selected,
        updates=PersistentMap(),
        recent=tuple(closed[len(closed) - config.max_staleness :]) if config.max_staleness else (),
        counted={
            round_: devices
            for round_, devices in with_counted(state.counted, state.updates).items()
            if round_ >= oldest
        },
    )
    commands = announce(blobs, announced)
    if step.purpose is Stage.HEAD and starts and (unasked := sorted(suspects(plan, state) - selected)):
        about = "their updates often pointed away from the others; check these devices and their labels"
        commands = [Log(f"no sums of {listed(unasked)}: {about}", warning=True), *commands]
    return state, commands


def _selected(plan: Plan, state: State, step: Step, number: int) -> frozenset[str]:
    """The devices that the round asks. A repeated round of training asks every device, because the same selection could
    fail again. For the head only devices whose updates were not often left out are asked."""
    if step.part is not None and plan.masks and step.stage is not Stage.KEYS:
        return asked_devices(state, step.stage) - state.excluded
    ready, least = {name: state.devices[name] for name in state.ready}, state.limits.min_updates
    left_out_ones = {name for name in ready if is_left_out(state.refused.get(name), number)}
    if step.part is not None:
        left_out_ones |= left_out_of_sums(state.silent, number).keys()
        least = max(least, MIN_DEVICES)
    eligible = eligible_devices(ready, left_out_ones, least)
    if step.purpose is Stage.HEAD:
        eligible = eligible_devices(eligible, suspects(plan, state), max(least, MIN_DEVICES))
    if step.stage is Stage.CANARY:
        selected = canaries(plan, state, eligible, number) if state.repeats <= MAX_REPEATS else frozenset()
    elif step.purpose not in TRAINING or state.repeats:
        selected = frozenset(eligible)
    else:
        selected = select_devices(plan.config, eligible, state.sal.level, number, least)
    if step.part is not None:  # the same ones in all of its rounds
        return frozenset(lowest(selected, MAX_NAMED, plan.config.seed, plan.positions_of(step.part).start))
    return at_most(selected, state.ready, state.excluded, plan.config.seed, number)


def _end_of_time(
    plan: Plan, state: State, announced: Round, working: frozenset[str], now: float
) -> tuple[State, list[Command]]:
    """At the deadline. A round with too few updates gets twice the time while awaited devices that are online are
    `working`: if it were repeated, their work would be lost, and the repeated round would take as long."""
    busy = sorted(working & state.awaited & state.online - state.answered)
    after = f"{next_deadline(plan, state) - state.since:.0f} s"
    if not _too_few(plan, state, announced) or not busy or state.stretch >= MAX_STRETCH:
        state, notes = _leave_out_silent(plan, state, working)
        state, commands = _close_round(plan, state, announced, now)
        commands = [*notes, *commands]
        if busy:
            late = f"round {announced.round}: still at work after {after}: {listed(busy)}; {RAISE_TIMEOUT}"
            commands = [Log(late, warning=True), *commands]
        return state, commands
    seconds = next_deadline(plan, state := replace(state, stretch=2 * state.stretch)) - state.since
    text = (
        f"{_too_few(plan, state, announced)} after {after}; still at work: {listed(busy)}; "
        f"it lasts up to {seconds:.0f} s now. {RAISE_TIMEOUT}"
    )
    return state, [Log(text, warning=True)]


def _leave_out_silent(plan: Plan, state: State, working: frozenset[str]) -> tuple[State, list[Log]]:
    """At the deadline of a round of a secure sum: the devices that are online, not at work, and have not answered. They
    would cost the next sums their deadlines too."""
    part, quiet = plan.schedule[state.position].part, sorted(state.awaited & state.online - state.answered - working)
    if part is None or not quiet:
        return state, []
    until = state.round + LEFT_OUT_SUMS * len(plan.positions_of(part))
    silent = {**left_out_of_sums(state.silent, state.round), **dict.fromkeys(quiet, until)}
    about = f"left out of the next {LEFT_OUT_SUMS} secure sums, unless fewer than {MIN_DEVICES} would remain"
    text = f"round {state.round}: online but without an answer: {listed(quiet)}; {about}"
    return replace(state, silent=silent), [Log(text, warning=True)]


def _too_few(plan: Plan, state: State, closing: Round) -> str:
    """Why the updates of the round are too few, or ""."""
    count, least = len(state.updates), fewest_updates(plan, state)
    if count < least:
        return f"round {state.round} got {number_of(count, 'update')}, fewer than {least}"
    return "" if plan.schedule[state.position].part is None else shortage(plan, state, closing)


def _close_round(plan: Plan, state: State, closing: Round, now: float) -> tuple[State, list[Command]]:
    """Applies the updates and opens the next round, or repeats this one."""
    limits, finish, step = state.limits, len(plan.schedule) - 1, plan.schedule[state.position]
    too_few = _too_few(plan, state, closing)
    if not too_few and (rejected := _rejected_head(plan, state, closing)):
        text = f"{rejected}; the head of stage 1 comes back, its last rounds are repeated, then stage 2 begins again"
        record = _record(state, closing, now, text)
        state = replace(with_former_head(state), repeats=0, stretch=1)
        state, commands = _open_round(plan, state, plan.retraining, now)
        return state, [record, Log(text, warning=True), *commands]
    if not too_few and (rejected := rejection(plan, state, closing)):
        return _reject_candidate(plan, state, closing, rejected, now)
    record = _record(state, closing, now, too_few)
    if not too_few:
        notes = [scaled_down(plan, state)] if closing.stage in TRAINING else []
        try:
            applied = apply_round(plan, with_verdict(plan, state, closing), closing)
        except (SecureAggregationError, MessageError) as error:
            assert step.part is not None
            state, commands = _skip_part(plan, state, step.part, str(error), now)
            return state, [record, *commands]
        if applied.expert is not state.expert:
            applied = replace(applied, made=closing.round)
        notes += [left_out(plan, state, applied)] if closing.stage in TRAINING else []
        if step.stage in (Stage.KEYS, Stage.SHARES) and applied.secure.level < closing.level:
            about = f"fewer than {MIN_DEVICES} devices answer at a higher one"
            notes.append(f"this round trains at level {applied.secure.level}: {about}")
        quick = 2 * (now - state.since) < next_deadline(plan, state) - state.since
        stretch = max(state.stretch // 2, 1) if quick else state.stretch
        position = _following(plan, applied)
        # repeats of all rounds of a secure aggregation count together
        repeats = state.repeats if step.part is not None and plan.schedule[position].part == step.part else 0
        state, commands = _open_round(plan, replace(applied, repeats=repeats, stretch=stretch), position, now)
        warnings = [Log(note, warning=True) for note in notes if note]
        return state, [record, *warnings, *commands, *([Stop()] if state.position == finish else [])]
    if step.part is not None and _is_skipped(step, step.part, state.repeats):
        state, commands = _skip_part(plan, state, step.part, too_few, now)
        return state, [record, *commands]
    if limits.max_repeats is not None and state.repeats >= limits.max_repeats:
        times = f"{state.repeats + 1} times in a row"
        state, commands = _open_round(plan, state, finish, now, is_end=True)
        return state, [record, *commands, Stop(f"{too_few}, {times}; the run ends")]
    position = state.position
    if step.part is not None and step.stage is not Stage.UNMASK:  # again with fresh keys
        position = plan.positions_of(step.part).start
    waits, silent = must_wait(plan, state), sorted(state.awaited & state.ready - state.answered)
    state, commands = _open_round(plan, replace(state, repeats=state.repeats + 1, stretch=1), position, now)
    if waits:
        text = f"{too_few}; the run waits: {reason(plan, state)}. {remedy(plan, state)}"
        return replace(state, waiting=True), [record, Log(text, warning=True), *commands]
    assert state.announced is not None
    lower = f" at level {state.announced.level}" if state.announced.level < closing.level else ""
    absent = f"; {reason(plan, state)}" if is_short(plan, state) else ""
    quiet = f"; without an answer: {listed(silent)}" if silent else ""
    return state, [record, Log(f"{too_few}; repeating it{lower}{quiet}{absent}", warning=True), *commands]


def _go_on(plan: Plan, state: State, waited: Round, now: float) -> tuple[State, list[Command]]:
    """The end of a wait. The open round gets its whole time, without the wait. If it does not ask enough of the devices
    that can answer, it is announced anew."""
    able = frozenset(name for name in state.ready if waited.asks(name))
    state = replace(state, waiting=False, since=now, repeats=0)
    if len(able) >= needed_updates(plan, state):
        text = f"round {waited.round} goes on: {number_of(len(able), 'device')} can answer now"
        return replace(state, expected=state.expected | able), [Log(text)]
    record = _record(state, waited, now, "it waited for devices that it did not ask")
    state, commands = _open_round(plan, state, state.position, now)
    return state, [record, Log(f"round {waited.round} waited; enough devices can answer now"), *commands]


def _roll_back(plan: Plan, state: State, rollback: Rollback, now: float) -> tuple[State, list[Command]]:
    """Goes on with the global expert of an earlier round. The updates of the present round fit another one."""
    text = f"rolled back to the global expert of round {rollback.round}"
    if state.announced is None:  # before the first round of a session
        returned = rolled_back(plan, state, 0)
        start = returned.expert[: plan.bundle.expert.size(returned.sal.level)]
        return replace(returned, start=start, standing=state.standing.with_news()), [Log(text, warning=True)]
    records = [] if state.announced.stage is Stage.FINISHED else [_record(state, state.announced, now, text)]
    position = restart_position(plan, state.position)
    returned = replace(rolled_back(plan, state, position), repeats=0, stretch=1)
    state, commands = _open_round(plan, returned, position, now)
    return replace(state, recent=()), [*records, Log(text, warning=True), *commands]


def _reject_candidate(
    plan: Plan, state: State, closing: Round, rejected: str, now: float
) -> tuple[State, list[Command]]:
    """Goes on with the last good global expert. A round that has trained from the candidate begins again, and no late
    update of it counts. A head of sums is gone then, so rounds of stage 1 are repeated as after `_rejected_head`."""
    is_canary, has_sums = closing.stage is Stage.CANARY, state.former.head.size > 0
    record = _record(state, closing, now, "" if is_canary else rejected, rejected)
    position = plan.retraining if has_sums else state.position + is_canary
    state, commands = _open_round(plan, replace(with_last_good(state), repeats=0, stretch=1), position, now)
    return replace(state, recent=()), [record, Log(f"round {closing.round}: {rejected}", warning=True), *commands]


def _following(plan: Plan, state: State) -> int:
    """The position of the next round. After a rejected head no sums replace the trained one."""
    position = state.position + 1
    while state.former.rejected and plan.schedule[position].purpose is Stage.HEAD:
        position += 1
    return position


def _rejected_head(plan: Plan, state: State, closing: Round) -> str:
    """Why the first round of stage 2 has to begin again with the head of stage 1, or "". Under secure
    aggregation devices report no accuracies, so a report is a hostile device's."""
    if closing.stage is not Stage.PERSONAL or closing.index or plan.schedule[state.position].part is not None:
        return ""
    return why_rejected(state.former, newest_updates(state))


def _is_skipped(step: Step, part: Part, repeats: int) -> bool:
    """Whether the run goes on without a secure aggregation, of which a round got too few updates."""
    if part[0] in TRAINING:
        return step.stage is Stage.UNMASK and repeats >= MAX_REPEATS
    return step.stage in SUMS or repeats >= MAX_REPEATS


def _skip_part(plan: Plan, state: State, part: Part, reason: str, now: float) -> tuple[State, list[Command]]:
    """Goes on without a secure aggregation."""
    state = replace(without_sums(plan, state, part[0]), repeats=0, stretch=1)
    state, commands = _open_round(plan, state, plan.positions_of(part).stop, now)
    return state, [Log(f"no secure aggregation: {reason}; {WITHOUT[part[0]]}", warning=True), *commands]


def _record(state: State, closing: Round, now: float, repeated: str, rejected: str = "") -> StoreRound:
    """The record of a round.

    If late updates count, a device may have several: the record has the newest one, and the bytes of all.
    """
    in_order = state.in_order
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
        rejected=rejected,
    )
    return StoreRound(closed)
