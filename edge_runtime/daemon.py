"""The daemon's decisions as a state machine without I/O: `advance(state, event) -> (state, commands)`.

It follows the newest announced round: fetch the globals it names, work, send the update, and send it again after every
reconnection until the server has acknowledged it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from protocol.messages import Ack, Round, ServerStatus, Stage, Verdict


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
    """`held`: global blobs on disk. `unsettled`: rounds whose update the server has not acknowledged. `done`: the last
    round worked on."""

    bundle: str
    held: frozenset[str] = frozenset()
    unsettled: frozenset[int] = frozenset()
    current: Round | None = None
    done: int = 0


def advance(state: State, event: Event) -> tuple[State, list[Command]]:
    if isinstance(event, ServerSeen):
        return state, _check_server(state, event.status)
    if isinstance(event, RoundSeen):
        return _follow(state, event.round)
    if isinstance(event, GlobalArrived):
        return replace(state, held=state.held | {event.sha256}), []
    if isinstance(event, Idle):
        return _work_if_ready(state)
    if isinstance(event, WorkDone):
        return replace(state, unsettled=state.unsettled | {event.round}), [Send(event.round)]
    if isinstance(event, Reconnected):
        return state, [Send(round_) for round_ in sorted(state.unsettled)]
    if event.ack.verdict is Verdict.REJECTED or event.ack.round in state.unsettled:
        return replace(state, unsettled=state.unsettled - {event.ack.round}), [Settle(event.ack)]
    return state, []


def wanted(announced: Round) -> set[str]:
    """The global blobs a round needs."""
    return {sha256 for sha256 in (announced.expert, announced.start, announced.gate) if sha256}


def _check_server(state: State, status: ServerStatus) -> list[Command]:
    if status.online and status.bundle != state.bundle:
        return [
            Leave(
                f"run {status.run!r} uses another bundle (model {status.model}, SHA-256 {status.bundle[:12]}…) than "
                f"this device ({state.bundle[:12]}…); give it the run's bundle, or none to fetch it from the server"
            )
        ]
    return []


def _follow(state: State, announced: Round) -> tuple[State, list[Command]]:
    if announced.stage is Stage.FINISHED:
        return replace(state, current=None), [Leave()]
    if announced.round == state.done or (state.current and announced.round == state.current.round):
        return state, []
    return replace(state, current=announced), [Fetch(sha256) for sha256 in sorted(wanted(announced) - state.held)]


def _work_if_ready(state: State) -> tuple[State, list[Command]]:
    if state.current is None or not wanted(state.current) <= state.held:
        return state, []
    held = state.held & wanted(state.current)  # what the round does not name is dropped from disk
    work = Work(state.current)
    return replace(state, current=None, done=work.round.round, held=held), [work]
