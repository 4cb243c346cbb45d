"""Closes rounds: applies the updates and opens the next round, or repeats one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fedfmsl.algorithms.secure_aggregation import MIN_DEVICES, SecureAggregationError
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import Round, Stage
from trainer_server.coordinator.adoption import rejection, with_last_good, with_verdict
from trainer_server.coordinator.candidates import Rollback
from trainer_server.coordinator.events import Command, Log, Stop, StoreRound
from trainer_server.coordinator.former_head import why_rejected
from trainer_server.coordinator.limits import MAX_STRETCH
from trainer_server.coordinator.open_round import open_round, skip_part
from trainer_server.coordinator.records import ClosedRound, listed, number_of
from trainer_server.coordinator.refusals import LEFT_OUT_SUMS, left_out_of_sums
from trainer_server.coordinator.rollback import restart_position, rolled_back
from trainer_server.coordinator.round_end import next_deadline, why_too_few
from trainer_server.coordinator.round_update import apply_round, left_out, newest_updates, scaled_down, with_former_head
from trainer_server.coordinator.secure_sums import MAX_REPEATS
from trainer_server.coordinator.state import SUMS, TRAINING, Part, Plan, State, Step
from trainer_server.coordinator.waiting import is_short, must_wait, needed_updates, reason, remedy

RAISE_TIMEOUT = "If this repeats, stop the server and resume with a longer --round-timeout"


def end_of_time(
    plan: Plan, state: State, announced: Round, working: frozenset[str], now: float
) -> tuple[State, list[Command]]:
    """At the deadline. A round with too few updates gets twice the time while awaited devices that are online are
    `working`: if it were repeated, their work would be lost, and the repeated round would take as long."""
    busy = sorted(working & state.awaited & state.online - state.answered)
    after = f"{next_deadline(plan, state) - state.since:.0f} s"
    if not why_too_few(plan, state, announced) or not busy or state.stretch >= MAX_STRETCH:
        state, notes = _leave_out_silent(plan, state, working)
        state, commands = close_round(plan, state, announced, now)
        commands = [*notes, *commands]
        if busy:
            late = f"round {announced.round}: still at work after {after}: {listed(busy)}; {RAISE_TIMEOUT}"
            commands = [Log(late, warning=True), *commands]
        return state, commands
    seconds = next_deadline(plan, state := replace(state, stretch=2 * state.stretch)) - state.since
    text = (
        f"{why_too_few(plan, state, announced)} after {after}; still at work: {listed(busy)}; "
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


def close_round(plan: Plan, state: State, closing: Round, now: float) -> tuple[State, list[Command]]:
    """Applies the updates and opens the next round, or repeats this one."""
    limits, finish, step = state.limits, len(plan.schedule) - 1, plan.schedule[state.position]
    too_few = why_too_few(plan, state, closing)
    if not too_few and (rejected := _rejected_head(plan, state, closing)):
        text = f"{rejected}; the head of stage 1 comes back, its last rounds are repeated, then stage 2 begins again"
        record = _record(state, closing, now, text)
        state = replace(with_former_head(state), repeats=0, stretch=1)
        state, commands = open_round(plan, state, plan.retraining, now)
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
            state, commands = skip_part(plan, state, step.part, str(error), now)
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
        state, commands = open_round(plan, replace(applied, repeats=repeats, stretch=stretch), position, now)
        warnings = [Log(note, warning=True) for note in notes if note]
        return state, [record, *warnings, *commands, *([Stop()] if state.position == finish else [])]
    if step.part is not None and _is_skipped(step, step.part, state.repeats):
        state, commands = skip_part(plan, state, step.part, too_few, now)
        return state, [record, *commands]
    if limits.max_repeats is not None and state.repeats >= limits.max_repeats:
        times = f"{state.repeats + 1} times in a row"
        state, commands = open_round(plan, state, finish, now, is_end=True)
        return state, [record, *commands, Stop(f"{too_few}, {times}; the run ends")]
    position = state.position
    if step.part is not None and step.stage is not Stage.UNMASK:  # again with fresh keys
        position = plan.positions_of(step.part).start
    waits, silent = must_wait(plan, state), sorted(state.awaited & state.ready - state.answered)
    state, commands = open_round(plan, replace(state, repeats=state.repeats + 1, stretch=1), position, now)
    if waits:
        text = f"{too_few}; the run waits: {reason(plan, state)}. {remedy(plan, state)}"
        return replace(state, waiting=True), [record, Log(text, warning=True), *commands]
    assert state.announced is not None
    lower = f" at level {state.announced.level}" if state.announced.level < closing.level else ""
    absent = f"; {reason(plan, state)}" if is_short(plan, state) else ""
    quiet = f"; without an answer: {listed(silent)}" if silent else ""
    return state, [record, Log(f"{too_few}; repeating it{lower}{quiet}{absent}", warning=True), *commands]


def _reject_candidate(
    plan: Plan, state: State, closing: Round, rejected: str, now: float
) -> tuple[State, list[Command]]:
    """Goes on with the last good global expert. A round that has trained from the candidate begins again, and no late
    update of it counts. A head of sums is gone then, so rounds of stage 1 are repeated as after `_rejected_head`."""
    is_canary, has_sums = closing.stage is Stage.CANARY, state.former.head.size > 0
    record = _record(state, closing, now, "" if is_canary else rejected, rejected)
    position = plan.retraining if has_sums else state.position + is_canary
    state, commands = open_round(plan, replace(with_last_good(state), repeats=0, stretch=1), position, now)
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


def go_on(plan: Plan, state: State, waited: Round, now: float) -> tuple[State, list[Command]]:
    """The end of a wait. The open round gets its whole time, without the wait. If it does not ask enough of the devices
    that can answer, it is announced anew."""
    able = frozenset(name for name in state.ready if waited.asks(name))
    state = replace(state, waiting=False, since=now, repeats=0)
    if len(able) >= needed_updates(plan, state):
        text = f"round {waited.round} goes on: {number_of(len(able), 'device')} can answer now"
        return replace(state, expected=state.expected | able), [Log(text)]
    record = _record(state, waited, now, "it waited for devices that it did not ask")
    state, commands = open_round(plan, state, state.position, now)
    return state, [record, Log(f"round {waited.round} waited; enough devices can answer now"), *commands]


def roll_back(plan: Plan, state: State, rollback: Rollback, now: float) -> tuple[State, list[Command]]:
    """Goes on with the global expert of an earlier round. The updates of the present round fit another one."""
    text = f"rolled back to the global expert of round {rollback.round}"
    if state.announced is None:  # before the first round of a session
        returned = rolled_back(plan, state, 0)
        start = returned.expert[: plan.bundle.expert.size(returned.sal.level)]
        return replace(returned, start=start, standing=state.standing.with_news()), [Log(text, warning=True)]
    records = [] if state.announced.stage is Stage.FINISHED else [_record(state, state.announced, now, text)]
    position = restart_position(plan, state.position)
    returned = replace(rolled_back(plan, state, position), repeats=0, stretch=1)
    state, commands = open_round(plan, returned, position, now)
    return replace(state, recent=()), [*records, Log(text, warning=True), *commands]


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
