"""The daemon's decisions as a state machine without I/O: `advance(state, event) -> (state, commands)`.

It follows the newest round that the present server has announced: fetch the globals it names, work, send the update,
and send it again after every reconnection until the server has acknowledged it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from protocol.messages import Ack, Round, ServerStatus, Stage


@dataclass(frozen=True)
class ServerSeen:
    status: ServerStatus


@dataclass(frozen=True)
class RoundSeen:
    round: Round


@dataclass(frozen=True)
class GlobalArrived:
    sha256: str


@dataclass(frozen=True)
class WorkDone:
    """The update of this round lies in the outbox."""

    round: int


@dataclass(frozen=True)
class AckSeen:
    ack: Ack


@dataclass(frozen=True)
class Reconnected:
    pass


@dataclass(frozen=True)
class Idle:
    """No event is waiting. Work starts only now, so a device that was slow goes straight to the newest round."""


Event = ServerSeen | RoundSeen | GlobalArrived | WorkDone | AckSeen | Reconnected | Idle


@dataclass(frozen=True)
class Fetch:
    sha256: str


@dataclass(frozen=True)
class Work:
    round: Round


@dataclass(frozen=True)
class Send:
    """The update of this round, from the outbox."""

    round: int


@dataclass(frozen=True)
class Settle:
    """The server has spoken: the update of this round need not be kept."""

    ack: Ack


@dataclass(frozen=True)
class Leave:
    """Nothing more to do; `error` says why if something was wrong."""

    error: str = ""


Command = Fetch | Work | Send | Settle | Leave


@dataclass(frozen=True)
class State:
    """`session`: the one this device last worked in. `present`: that of the server that is online. `announced`: the
    newest round seen. `done`: the last round worked on. `held`: global blobs on disk. `unsettled`: rounds of `session`
    whose update has not been acknowledged."""

    bundle: str
    session: str = ""
    present: str = ""
    announced: Round | None = None
    done: int = 0
    held: frozenset[str] = frozenset()
    unsettled: frozenset[int] = frozenset()


def advance(state: State, event: Event) -> tuple[State, list[Command]]:
    """The next state, and what the shell has to do, in order."""
    if isinstance(event, ServerSeen):
        return _meet_server(state, event.status)
    if isinstance(event, RoundSeen):
        state = replace(state, announced=event.round)
        return state, _fetch_missing(state)
    if isinstance(event, GlobalArrived):
        return replace(state, held=state.held | {event.sha256}), []
    if isinstance(event, WorkDone):
        return replace(state, unsettled=state.unsettled | {event.round}), [Send(event.round)]
    if isinstance(event, Reconnected):
        return state, [Send(round_) for round_ in sorted(state.unsettled)]
    if isinstance(event, AckSeen):
        return _settle(state, event.ack)
    return _act(state)


def wanted(announced: Round) -> set[str]:
    """The global blobs a round needs."""
    return {sha256 for sha256 in (announced.expert, announced.start, announced.gate) if sha256}


def _meet_server(state: State, status: ServerStatus) -> tuple[State, list[Command]]:
    if not status.online:
        return replace(state, present=""), []
    if status.bundle != state.bundle:
        return state, [
            Leave(
                f"run {status.run!r} uses another bundle (model {status.model}, SHA-256 {status.bundle[:12]}…) than "
                f"this device ({state.bundle[:12]}…); give it the run's bundle, or none to fetch it from the server"
            )
        ]
    state = replace(state, present=status.session)
    return state, _fetch_missing(state)


def _fetch_missing(state: State) -> list[Command]:
    if state.announced is None or state.announced.session != state.present:
        return []
    return [Fetch(sha256) for sha256 in sorted(wanted(state.announced) - state.held)]


def _settle(state: State, ack: Ack) -> tuple[State, list[Command]]:
    if ack.session != state.session or ack.round not in state.unsettled:
        return state, []
    return replace(state, unsettled=state.unsettled - {ack.round}), [Settle(ack)]


def _act(state: State) -> tuple[State, list[Command]]:
    """Nothing is waiting: start on the announced round if it is new and all it needs is here, or leave if that was all.

    A finished run is only this device's business if it took part in it; else it waits for the next of that name.
    """
    announced = state.announced
    if announced is None:
        return state, []
    if announced.stage is Stage.FINISHED:
        return state, [Leave()] if announced.session == state.session else []
    new = announced.session != state.session or announced.round not in {state.done, *state.unsettled}
    if not new or announced.session != state.present or not wanted(announced) <= state.held:
        return state, []
    unsettled = state.unsettled if announced.session == state.session else frozenset()
    held = state.held & wanted(announced)  # what the round does not name is dropped from disk
    state = replace(state, session=announced.session, done=announced.round, unsettled=unsettled, held=held)
    return state, [Work(announced)]
