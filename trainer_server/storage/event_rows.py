"""Events of a run as rows of its log, the table `events` of RUN/run.sqlite."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.protocol.messages import DeviceStatus, Update, compact, parse
from trainer_server.coordinator.events import (
    ClockTicked,
    Event,
    LimitsChanged,
    OperatorActed,
    RestChanged,
    StatusSeen,
    UpdateRefused,
    UpdateSeen,
)
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.operator import Operation

Unpack = Callable[[str], tuple[Update, Tensors]]  # an update and its tensors, by the SHA-256 of its blob
Kind = Literal["status", "update", "refused", "limits", "operator", "rest", "tick"]
Row = tuple[float, Kind, str, str | None, int | None]  # at, kind, body, sha256, size


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event that changed the state, and its time on the run's clock."""

    at: float
    event: Event


def to_row(logged: LoggedEvent) -> Row:
    """The tensors of an update are not in its row."""
    event = logged.event
    if isinstance(event, StatusSeen):
        return logged.at, "status", event.status.model_dump_json(), None, None
    if isinstance(event, UpdateSeen):
        return logged.at, "update", event.update.model_dump_json(), event.sha256, event.size
    if isinstance(event, UpdateRefused):
        return logged.at, "refused", json.dumps(event.device), None, None
    if isinstance(event, LimitsChanged):
        return logged.at, "limits", event.limits.model_dump_json(), None, None
    if isinstance(event, OperatorActed):
        return logged.at, "operator", event.operation.model_dump_json(), event.operation.sha256 or None, None
    if isinstance(event, RestChanged):
        return logged.at, "rest", json.dumps(event.rests), None, None
    return logged.at, "tick", json.dumps([event.wall, *sorted(event.working)]), None, None


def from_row(row: Row, unpack: Unpack) -> LoggedEvent:
    """The inverse of `to_row`. The tensors of an update come from `unpack`."""
    at, kind, body, sha256, size = row
    return LoggedEvent(at, _event(kind, body, sha256, size, unpack))


def _event(kind: Kind, body: str, sha256: str | None, size: int | None, unpack: Unpack) -> Event:
    if kind == "status":
        return StatusSeen(compact(parse(DeviceStatus, body.encode())))
    if kind == "update":
        assert sha256 is not None and size is not None
        update, tensors = unpack(sha256)
        return UpdateSeen(compact(update), tensors, sha256, size)
    if kind == "refused":
        return UpdateRefused(json.loads(body))
    if kind == "limits":
        return LimitsChanged(parse(Limits, body.encode()))
    if kind == "operator":
        return OperatorActed(parse(Operation, body.encode()))
    if kind == "rest":
        return RestChanged(json.loads(body))
    wall, *working = json.loads(body)
    return ClockTicked(frozenset(working), wall)
