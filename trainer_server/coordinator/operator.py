"""What an operator may do to a run in progress (ours). Each action is an event of the log, so a replay repeats it.

pause, resume        no round opens or closes meanwhile, and no deadline passes
close                the present round closes now, with the updates that it has
exclude, include     a device takes part in no round any more; its update of the present round does not count
deadline             --round-timeout from now on
rollback             to the global expert that an earlier round has made (`trainer_server.coordinator.rollback`)
classes              are added after the present round (`trainer_server.coordinator.sessions`)
withdraw             classes that are not added yet
download             of the global expert; the log has it, and nothing changes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum
from typing import Literal

from fedfmsl.common.persistent_map import PersistentMap
from fedfmsl.protocol.messages import AddedNames, Amount, Message, Name, Number, Sha256, Stage, Text
from trainer_server.coordinator.candidates import Rollback
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.state import State, after_hold, with_counted


class Action(str, Enum):
    PAUSE = "pause"
    RESUME = "resume"
    CLOSE = "close"
    EXCLUDE = "exclude"
    INCLUDE = "include"
    DEADLINE = "deadline"
    ROLLBACK = "rollback"
    CLASSES = "classes"
    WITHDRAW = "withdraw"
    DOWNLOAD = "download"


class Operation(Message):
    """One action. `round`: the round to close; if it is not the present one any more, nothing happens. Or the round to
    return to; the server adds `sha256`, the blob of its global expert. `device`: to exclude or include. `seconds`: the
    new deadline. `classes`: to add or to withdraw. `by`: where it comes from. `name`: of the operator, if its
    certificate tells."""

    action: Action
    round: Number = 0
    device: Name | Literal[""] = ""
    seconds: Amount = 0.0
    sha256: Sha256 = ""
    classes: AddedNames = ()
    by: Text = ""
    name: Text = ""


def after_operations(
    paused: bool, excluded: Iterable[str], operations: Iterable[Operation]
) -> tuple[bool, frozenset[str]]:
    """Whether a run is paused, and the excluded devices, after actions that have taken effect."""
    devices = set(excluded)
    for operation in operations:
        if operation.action in (Action.PAUSE, Action.RESUME):
            paused = operation.action is Action.PAUSE
        elif operation.action is Action.EXCLUDE:
            devices.add(operation.device)
        elif operation.action is Action.INCLUDE:
            devices.discard(operation.device)
    return paused, frozenset(devices)


def classes_to_add(adds: Iterable[str], operations: Iterable[Operation]) -> tuple[str, ...]:
    """The classes that are added after the present round, once these actions have taken effect too."""
    names = [*adds]
    for operation in operations:
        if operation.action is Action.CLASSES:
            names += operation.classes
        elif operation.action is Action.WITHDRAW:
            names = [name for name in names if name not in operation.classes]
    return tuple(names)


def after_operation(limits: Limits, operation: Operation) -> Limits:
    """The limits after an action that has taken effect."""
    if operation.action is not Action.DEADLINE:
        return limits
    return limits.model_copy(update={"round_timeout": operation.seconds})


def act(state: State, operation: Operation, now: float) -> tuple[State, str]:
    """The next state, and what has happened. An action that is not possible changes nothing, and the text says why."""
    state, text = _ACTS[operation.action](state, operation, now)
    who = " ".join(["operator", *filter(None, (operation.name, operation.by and f"at {operation.by}"))])
    return state, f"{who}: {text}"


def _pause(state: State, operation: Operation, now: float) -> tuple[State, str]:
    if state.paused_at is not None:
        return state, "the run is already paused"
    return replace(state, paused_at=now), "the run is paused; no round opens or closes until it is resumed"


def _resume(state: State, operation: Operation, now: float) -> tuple[State, str]:
    if state.paused_at is None:
        return state, "the run is not paused"
    return after_hold(state, "paused_at", now), f"the run is resumed{_RESTS if state.rests_at is not None else ''}"


def _close(state: State, operation: Operation, now: float) -> tuple[State, str]:
    announced = state.announced
    if announced is None or announced.round != operation.round or announced.stage is Stage.FINISHED:
        return state, f"round {operation.round} is not open, so it cannot be closed"
    when = _when(state, "the run")
    return replace(state, closing=operation.round), f"round {operation.round} closes {when}"


def _exclude(state: State, operation: Operation, now: float) -> tuple[State, str]:
    device = operation.device
    if device not in state.devices:
        return state, f"{device} has not announced itself, so it cannot be excluded"
    if device in state.excluded:
        return state, f"{device} is already excluded"
    own = {key for key in state.updates if key[1] == device}
    excluded = replace(
        state,
        excluded=state.excluded | {device},
        expected=state.expected - {device},
        updates=PersistentMap({key: accepted for key, accepted in state.updates.items() if key not in own}),
        counted=with_counted(state.counted, own),
    )
    return excluded, f"{device} is excluded from this run; its updates are refused"


def _include(state: State, operation: Operation, now: float) -> tuple[State, str]:
    if operation.device not in state.excluded:
        return state, f"{operation.device} is not excluded"
    after = replace(state, excluded=state.excluded - {operation.device})
    return after, f"{operation.device} takes part again, from the next round on at the latest"


def _deadline(state: State, operation: Operation, now: float) -> tuple[State, str]:
    before = state.limits.round_timeout
    if not operation.seconds or operation.seconds == before:
        return state, f"the round deadline stays {before:g} s"
    text = f"the round deadline is {operation.seconds:g} s from now on, it was {before:g} s"
    return replace(state, limits=after_operation(state.limits, operation)), text


def _rollback(state: State, operation: Operation, now: float) -> tuple[State, str]:
    last = state.round - (state.announced is not None)  # the last closed round
    if not 0 < operation.round <= last or not operation.sha256:
        return state, f"no global expert of round {operation.round} is kept, so the run cannot return to it"
    when = _when(state, "it")
    rollback = Rollback(operation.round, operation.sha256)
    return replace(state, rollback=rollback), f"the run returns to the global expert of round {operation.round} {when}"


def _classes(state: State, operation: Operation, now: float) -> tuple[State, str]:
    when = f"after round {state.round}" if state.announced else _when(state, "the run")
    names = operation.classes
    text = f"{len(names)} {'class is' if len(names) == 1 else 'classes are'} added {when}: {', '.join(names)}"
    return replace(state, approved=(*state.approved, *names)), text


def _withdraw(state: State, operation: Operation, now: float) -> tuple[State, str]:
    names = operation.classes
    left = tuple(name for name in state.approved if name not in names)
    text = f"{len(names)} {'class is' if len(names) == 1 else 'classes are'} not added: {', '.join(names)}"
    return replace(state, approved=left), text


def _when(state: State, run: str) -> str:
    """When an action takes effect."""
    if state.paused_at is not None:
        return f"when {run} is resumed"
    return "now" if state.rests_at is None else f"when {run} rests no more"


def _download(state: State, operation: Operation, now: float) -> tuple[State, str]:
    return state, "the global expert is downloaded"


_RESTS = "; it rests outside of the hours of --schedule"
_ACTS: dict[Action, Callable[[State, Operation, float], tuple[State, str]]] = {
    Action.PAUSE: _pause,
    Action.RESUME: _resume,
    Action.CLOSE: _close,
    Action.EXCLUDE: _exclude,
    Action.INCLUDE: _include,
    Action.DEADLINE: _deadline,
    Action.ROLLBACK: _rollback,
    Action.CLASSES: _classes,
    Action.WITHDRAW: _withdraw,
    Action.DOWNLOAD: _download,
}
