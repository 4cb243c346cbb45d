"""The daemon's decisions as a state machine without I/O: `advance(state, event) -> (state, commands)`.

For the newest announced round that selects this device: fetch the round's globals, compute, send the update, and send
it again until the server has acknowledged it. The I/O loop measures time: it reports when an acknowledgement is overdue
(see `edge_runtime.daemon.retransmit`).

Of several running processes with one device name the newest stays (see `fedfmsl.protocol.duplicate_name`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_runtime.store.outbox import UNACKNOWLEDGED
from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import Ack, DeviceStatus, Round, ServerStatus, Stage, Verdict

MOST_RETURNS = 4  # of an earlier process; one that leaves for a newer process returns once or twice


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
    """The update of this round is in the outbox. Of FINISHED: this device has personalized itself alone."""

    round: int


@dataclass(frozen=True)
class WorkFailed:
    """The round was not completed, for example because the disk is full. It can be computed again."""

    round: int


@dataclass(frozen=True)
class WorkSkipped:
    """This device cannot take part in the round, and waits for the next one."""

    round: int


@dataclass(frozen=True)
class AckSeen:
    ack: Ack


@dataclass(frozen=True)
class OwnStatusSeen:
    """A status was published under this device's own name."""

    status: DeviceStatus


@dataclass(frozen=True)
class Reconnected:
    pass


@dataclass(frozen=True)
class AckOverdue:
    """The acknowledgement of an update has not arrived in time."""


@dataclass(frozen=True)
class Idle:
    """No other event is waiting. Work starts only now, so a slow device skips to the newest round."""


Event = (
    ServerSeen
    | RoundSeen
    | GlobalArrived
    | WorkDone
    | WorkFailed
    | WorkSkipped
    | AckSeen
    | OwnStatusSeen
    | Reconnected
    | AckOverdue
    | Idle
)


@dataclass(frozen=True)
class Fetch:
    sha256: str


@dataclass(frozen=True)
class Work:
    round: Round


@dataclass(frozen=True)
class Send:
    """Send the update of this round from the outbox: all of it, or only some chunks."""

    round: int
    chunks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Acknowledge:
    """Delete the update of this round: the server has acknowledged it."""

    ack: Ack


@dataclass(frozen=True)
class PublishStatus:
    """Publish this device's status again: another process has replaced it."""


@dataclass(frozen=True)
class Log:
    """Write a line to the log."""

    text: str


@dataclass(frozen=True)
class Stop:
    """End the daemon, because of an `error` if there is one. With `quietly` no status may be published, because a
    newer process uses the device's name. With `anew` the daemon does not end, but begins again with the server's task.
    """

    error: str = ""
    quietly: bool = False
    anew: bool = False


Command = Fetch | Work | Send | Acknowledge | PublishStatus | Log | Stop


@dataclass(frozen=True)
class State:
    """`bundle` and `task`: what this device is prepared for. `session`: the session that this device last worked in, of
    `run` ("": unknown). `server_session`: that of the server's last status. `online_session`: the same while the server
    is online, else "". `server_task`: that of the last status; None if its bundle is another one. `late_session`: the
    finished session that this device last began to personalize itself from.

    `announced`: the newest announced round. `running`: the round that is being computed. `last_started`: the last round
    whose computation was started. `stored`: SHA-256 of the global blobs on disk. `unacknowledged`: rounds of `session`
    with an unacknowledged update. `guard`: finds newer processes with this device's name. `ended`: newer processes that
    seem to have ended. `returns`: connections in which an earlier process was seen at work, at most one each
    (`returned`). `offline_logged`: whether the log has reported that the server is offline.
    """

    device: str
    guard: DuplicateNameGuard
    bundle: str
    task: str = ""
    session: str = ""
    run: str = ""
    server_session: str = ""
    online_session: str = ""
    server_task: str | None = None
    late_session: str = ""
    announced: Round | None = None
    last_started: int = 0
    stored: frozenset[str] = frozenset()
    unacknowledged: frozenset[int] = frozenset()
    ended: frozenset[str] = frozenset()
    returns: int = 0
    returned: bool = False
    offline_logged: bool = False
    running: Round | None = None


def advance(state: State, event: Event) -> tuple[State, list[Command]]:
    """The next state, and the commands for the I/O loop in order."""
    if isinstance(event, ServerSeen):
        return _see_server(state, event.status)
    if isinstance(event, RoundSeen):
        state = replace(state, announced=event.round, stored=state.stored & required_globals(event.round))
        return state, _fetch_missing(state)
    if isinstance(event, GlobalArrived):
        return replace(state, stored=state.stored | {event.sha256}), []
    if isinstance(event, WorkDone) and state.running is not None and state.running.stage is Stage.FINISHED:
        session, run = state.running.session, state.running.run
        state = replace(state, session=session, run=run, last_started=event.round, running=None)
        return replace(state, unacknowledged=frozenset()), []
    if isinstance(event, WorkDone):
        latest = sorted(state.unacknowledged | {event.round})[-UNACKNOWLEDGED:]  # as in the outbox
        state = replace(state, unacknowledged=frozenset(latest), running=None)
        return state, [Send(event.round)] if state.online_session == state.session else []
    if isinstance(event, WorkFailed):
        alone = state.running is not None and state.running.stage is Stage.FINISHED
        return replace(state, last_started=state.last_started if alone else event.round - 1, running=None), []
    if isinstance(event, WorkSkipped):
        return replace(state, running=None), []
    if isinstance(event, Reconnected):
        return replace(state, returned=False), _send_unacknowledged(state)
    if isinstance(event, AckOverdue):
        return state, _send_unacknowledged(state)
    if isinstance(event, AckSeen):
        return _acknowledge(state, event.ack)
    if isinstance(event, OwnStatusSeen):
        return _see_own_status(state, event.status)
    return _act(state)


def is_outdated(state: State) -> bool:
    """Whether a newer round has been announced than the one that is being computed."""
    return state.running is not None and state.announced != state.running


def required_globals(announced: Round | None) -> set[str]:
    """SHA-256 of the global blobs that a round needs."""
    return set(announced.blobs) if announced else set()


def joins_late(state: State, announced: Round) -> bool:
    """Whether this device personalizes itself from a finished run in which it took no part. A run that has
    ended before stage 1 has no global expert."""
    ended = announced.stage is Stage.FINISHED and bool(announced.expert and announced.gate)
    return ended and announced.session == state.server_session != state.session and state.server_task is not None


def _see_server(state: State, status: ServerStatus) -> tuple[State, list[Command]]:
    state = replace(state, server_task=status.task if status.bundle == state.bundle else None)
    if not status.online:
        finished = state.announced is not None and state.announced.stage is Stage.FINISHED
        offline = Log(f"the server of run {status.run} is offline; waiting for it")
        report = not finished and not state.offline_logged
        state = replace(state, server_session=status.session, online_session="", offline_logged=not finished)
        return state, [*([offline] if report else []), *_fetch_missing(state)]
    if status.bundle != state.bundle:
        return state, [Stop(other_bundle(status, state.bundle))]
    if status.task != state.task:
        return state, _begin_anew(status.run, status.task)
    online = [Log(f"the server of run {status.run} is online")] if state.offline_logged else []
    state = replace(state, server_session=status.session, online_session=status.session, offline_logged=False)
    return state, [*online, *_send_unacknowledged(state), *_fetch_missing(state)]


def _begin_anew(run: str, task: str) -> list[Command]:
    text = f"run {run!r} has another task (SHA-256 {task[:12]}…); this device begins again with it"
    return [Log(text), Stop(anew=True)]


def other_bundle(status: ServerStatus, own: str) -> str:
    """Why a device with the bundle `own`, a SHA-256, cannot take part."""
    return (
        f"run {status.run!r} uses another bundle (model {status.model}, SHA-256 {status.bundle[:12]}…) than "
        f"this device ({own[:12]}…); pass the run's --bundle, or none to fetch it from the server"
    )


def _see_own_status(state: State, status: DeviceStatus) -> tuple[State, list[Command]]:
    """A broker that allows one connection per identity ends the newer process's connection whenever this process
    connects, and publishes its last will. So the last will of a newer process counts as its end once only: a process
    that has really ended does not come back.

    Two processes that start at the same time on such a broker may each see the other's last will first, and then take
    each other for the earlier one. After MOST_RETURNS the one with the lower instance leaves."""
    guard, instance = state.guard.observe(status.instance), status.instance
    state = replace(state, guard=guard)
    newer, loses = guard.is_newer(instance), False
    if guard.confirmed and instance in guard.earlier and not state.returned:
        state = replace(state, returns=state.returns + 1, returned=True)
        loses = state.returns >= MOST_RETURNS and guard.instance < instance
    is_will = guard.confirmed and instance != guard.instance and not status.online
    if is_will and not loses and instance not in state.ended:
        return replace(state, ended=state.ended | {instance} if newer else state.ended), [PublishStatus()]
    if not (newer or loses):
        return state, []
    error = (
        f"duplicate device name {state.device!r}: a newer process took over; if these are two devices, start one of "
        "them with another --device name and an empty --state folder"
    )
    return state, [Stop(error, quietly=True)]


def _send_unacknowledged(state: State) -> list[Command]:
    """Sends updates only to the server of their session."""
    return [Send(round_) for round_ in sorted(state.unacknowledged)] if state.online_session == state.session else []


def _fetch_missing(state: State) -> list[Command]:
    announced = state.announced
    if announced is None or not (_is_for_this_device(state, announced) or _is_late_for(state, announced)):
        return []
    return [Fetch(sha256) for sha256 in sorted(required_globals(announced) - state.stored)]


def _is_late_for(state: State, announced: Round) -> bool:
    """`joins_late`, and the device is prepared for the run's task."""
    return joins_late(state, announced) and state.server_task == state.task


def _is_for_this_device(state: State, announced: Round) -> bool:
    """Whether a round is from the online server, selects this device, and has not been computed."""
    asked = announced.stage is not Stage.FINISHED and announced.asks(state.device)
    new = announced.session != state.session or announced.round > state.last_started
    return asked and new and announced.session == state.online_session


def _acknowledge(state: State, ack: Ack) -> tuple[State, list[Command]]:
    if ack.session != state.session or ack.round not in state.unacknowledged:
        return state, []
    if ack.verdict is Verdict.INCOMPLETE:
        return state, [Send(ack.round, ack.missing)] if ack.missing else []
    return replace(state, unacknowledged=state.unacknowledged - {ack.round}), [Acknowledge(ack)]


def _act(state: State) -> tuple[State, list[Command]]:
    """Starts the announced round if it is new and its globals are on disk. Stops if the run has finished, unless a
    server of another session has come since: then it waits for the next run of that name. A device that did not take
    part personalizes itself first. The broker keeps the end of a run until the next run's first round."""
    announced = state.announced
    if announced is None or state.running is not None:
        return state, []
    if announced.stage is Stage.FINISHED:
        return _end(state, announced)
    if not _is_for_this_device(state, announced) or not required_globals(announced) <= state.stored:
        return state, []
    anew = state.session not in ("", announced.session)
    goes_on = announced.round > state.last_started  # round numbers go on in the next session of a run
    what = "goes on" if goes_on else "was started anew"
    what = f"run {announced.run!r} {what} (session {announced.session})"
    if state.run not in ("", announced.run):
        what = f"this device changed from run {state.run!r} to {announced.run!r}"
    log = f"{what}; starting with round {announced.round}"
    unacknowledged = state.unacknowledged if announced.session == state.session else frozenset()
    state = replace(
        state,
        session=announced.session,
        run=announced.run,
        last_started=announced.round,
        unacknowledged=unacknowledged,
        running=announced,
    )
    return state, [Log(log), Work(announced)] if anew else [Work(announced)]


def _end(state: State, finished: Round) -> tuple[State, list[Command]]:
    if finished.session == state.session == state.server_session:
        return state, [Stop()]
    if not joins_late(state, finished):
        return state, []
    if state.server_task != state.task:
        return state, _begin_anew(finished.run, state.server_task or "")
    if not required_globals(finished) <= state.stored:
        return state, []
    text = f"run {finished.run!r} has finished without this device; it personalizes itself from the run's global expert"
    log = [Log(text)] if state.late_session != finished.session else []  # once, not at each try
    return replace(state, running=finished, late_session=finished.session), [*log, Work(finished)]
