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

from dataclasses import replace

from trainer_server.coordinator.close_round import close_round, end_of_time, go_on, roll_back
from trainer_server.coordinator.events import (
    Command,
    Event,
    LimitsChanged,
    Log,
    OperatorActed,
    RestChanged,
    StatusSeen,
    UpdateRefused,
    UpdateSeen,
)
from trainer_server.coordinator.open_round import maybe_start
from trainer_server.coordinator.operator import Action, Operation, act
from trainer_server.coordinator.receive import receive_status, receive_update, refuse_update
from trainer_server.coordinator.rollback import why_no_rollback
from trainer_server.coordinator.round_end import is_complete, next_deadline
from trainer_server.coordinator.sessions import why_no_classes, why_not_withdrawn
from trainer_server.coordinator.state import Plan, State, after_hold
from trainer_server.coordinator.waiting import is_short


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
        return roll_back(plan, state, state.rollback, now)
    if state.announced is None:
        return maybe_start(plan, state, event.wall, now)
    if state.closing == state.round or is_complete(plan, state, state.announced):
        return close_round(plan, state, state.announced, now)
    if state.waiting:
        return (state, []) if is_short(plan, state) else go_on(plan, state, state.announced, now)
    if now >= next_deadline(plan, state):
        return end_of_time(plan, state, state.announced, event.working, now)
    return state, []


def _why_not(plan: Plan, state: State, operation: Operation) -> str:
    """Why an action of the operator is not possible, or "". Others are checked when they are carried out."""
    if operation.action is Action.ROLLBACK:
        return why_no_rollback(plan, state)
    if operation.action is Action.WITHDRAW:
        return why_not_withdrawn(plan, state, operation.classes)
    return why_no_classes(plan, state, operation.classes) if operation.action is Action.CLASSES else ""
