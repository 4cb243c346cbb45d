"""What the coordinator hears, and what it tells its shell to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from protocol.messages import Ack, DeviceStatus, Round, Update
from protocol.tensors import Tensors


@dataclass(frozen=True)
class StatusSeen:
    status: DeviceStatus


@dataclass(frozen=True)
class UpdateSeen:
    update: Update
    tensors: Tensors
    size: int  # bytes on the wire


@dataclass(frozen=True)
class ClockTicked:
    pass


Event = StatusSeen | UpdateSeen | ClockTicked


@dataclass(frozen=True)
class PublishGlobals:
    sha256: str
    blob: bytes


@dataclass(frozen=True)
class Announce:
    round: Round


@dataclass(frozen=True)
class Reply:
    ack: Ack


@dataclass(frozen=True)
class Record:
    """A closed round, for the run's log."""

    round: Round
    seconds: float
    updates: Mapping[str, Update]
    bytes_up: Mapping[str, int]
    missing: tuple[str, ...]
    repeated: bool


@dataclass(frozen=True)
class Note:
    """Something an operator should read."""

    text: str


@dataclass(frozen=True)
class Stop:
    """The run has ended; `error` says why if it failed."""

    error: str = ""


Command = PublishGlobals | Announce | Reply | Record | Note | Stop
