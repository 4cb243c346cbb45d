"""Events that the coordinator receives, and commands that it gives to the I/O loop."""

from __future__ import annotations

from dataclasses import dataclass

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.protocol.messages import Ack, DeviceStatus, Round, Update
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.operator import Operation
from trainer_server.coordinator.records import ClosedRound


@dataclass(frozen=True, slots=True)
class StatusSeen:
    status: DeviceStatus


@dataclass(frozen=True, slots=True)
class UpdateSeen:
    """A complete update. `sha256` is its blob's, `size` its bytes on the wire."""

    update: Update
    tensors: Tensors
    sha256: str
    size: int


@dataclass(frozen=True)
class UpdateRefused:
    """A selected device's update for the present round was refused. The log has this instead of the update."""

    device: str


@dataclass(frozen=True)
class LimitsChanged:
    """The operator has resumed the run with other limits."""

    limits: Limits


@dataclass(frozen=True)
class OperatorActed:
    operation: Operation


@dataclass(frozen=True)
class RestChanged:
    """The wall clock has left the hours of --schedule, and the run rests; or it has entered them."""

    rests: bool


@dataclass(frozen=True)
class ClockTicked:
    """No message is waiting. Rounds open and close only at this event, so every message that arrived before counts.
    `working`: devices whose heartbeats show that they are at work. `wall`: the wall clock, in unix seconds."""

    working: frozenset[str] = frozenset()
    wall: float = 0.0


Event = StatusSeen | UpdateSeen | UpdateRefused | LimitsChanged | OperatorActed | RestChanged | ClockTicked


@dataclass(frozen=True)
class PublishGlobals:
    sha256: str
    blob: bytes


@dataclass(frozen=True)
class AnnounceRound:
    round: Round


@dataclass(frozen=True)
class SendAck:
    ack: Ack


@dataclass(frozen=True)
class CountRefusal:
    """A refused message. `kind` is the category that refusals are counted by, `text` the details."""

    device: str
    kind: str
    text: str


@dataclass(frozen=True)
class StoreRound:
    """Store the record of a closed round."""

    closed: ClosedRound


@dataclass(frozen=True)
class Log:
    """Write a line for the operator. `warning`: something needs attention."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Stop:
    """End the run. `error` is the reason if it failed."""

    error: str = ""


@dataclass(frozen=True)
class BeginSession:
    """End this session, and begin the run's next one with the state that comes with this command. Its task has
    `classes` in addition, and it has `stage1_rounds` rounds of stage 1; None: as many as the first session."""

    classes: tuple[str, ...] = ()
    stage1_rounds: int | None = None


Command = PublishGlobals | AnnounceRound | SendAck | CountRefusal | StoreRound | Log | Stop | BeginSession
