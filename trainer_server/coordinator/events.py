"""What the coordinator hears, and what it tells its shell to do."""

from __future__ import annotations

from dataclasses import dataclass

from fedfmsl.protocol.messages import Ack, DeviceStatus, Round, Update
from fedfmsl.protocol.tensors import Tensors
from trainer_server.coordinator.records import ClosedRound


@dataclass(frozen=True)
class StatusSeen:
    status: DeviceStatus


@dataclass(frozen=True)
class UpdateSeen:
    """A whole update. `sha256` is its blob's, `size` the bytes it took on the wire."""

    update: Update
    tensors: Tensors
    sha256: str
    size: int


@dataclass(frozen=True)
class ClockTicked:
    """Nothing has come for now: rounds open and close only here, so that all that has come before is counted."""


Event = StatusSeen | UpdateSeen | ClockTicked


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
    """Something that does not count, and never costs the round: who sent it, what kind of thing is wrong, the rest."""

    device: str
    kind: str
    text: str


@dataclass(frozen=True)
class StoreRound:
    """A round has closed: for the run's log."""

    closed: ClosedRound


@dataclass(frozen=True)
class Log:
    """Something an operator should read."""

    text: str


@dataclass(frozen=True)
class Stop:
    """The run has ended; `error` says why if it failed."""

    error: str = ""


Command = PublishGlobals | AnnounceRound | SendAck | CountRefusal | StoreRound | Log | Stop
