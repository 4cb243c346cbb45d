"""The state of a run at the moment a round opens, as one blob: what a server that starts again goes on from. No update
of the round has come yet, so it holds none."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel

from protocol.messages import DeviceStatus, Round
from protocol.sal import SalState
from protocol.tensors import pack, unpack
from trainer_server.optimizers import Moments
from trainer_server.state import State


class _Header(BaseModel):
    level: int
    queue: tuple[float, ...]
    seen: int
    since: float
    position: int
    round: int
    repeats: int
    announced: Round | None
    devices: list[DeviceStatus]
    expected: list[str]
    counted: list[tuple[int, str]]


def to_blob(state: State) -> bytes:
    header = _Header(
        level=state.sal.level,
        queue=state.sal.queue,
        seen=state.sal.seen,
        since=state.since,
        position=state.position,
        round=state.round,
        repeats=state.repeats,
        announced=state.announced,
        devices=list(state.devices.values()),
        expected=sorted(state.expected),
        counted=sorted(state.counted),
    )
    return pack(
        header,
        {
            "expert": state.expert,
            "gate": state.gate,
            "start": state.start,
            "expert_first": state.expert_moments.first,
            "expert_second": state.expert_moments.second,
            "gate_first": state.gate_moments.first,
            "gate_second": state.gate_moments.second,
        },
    )


def from_blob(blob: bytes) -> State:
    """Raises MessageError if the blob holds no state."""
    header, tensors = unpack(blob, _Header)
    vectors = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    return State(
        expert=vectors["expert"],
        gate=vectors["gate"],
        start=vectors["start"],
        expert_moments=Moments(vectors["expert_first"], vectors["expert_second"]),
        gate_moments=Moments(vectors["gate_first"], vectors["gate_second"]),
        sal=SalState(header.level, header.queue, header.seen),
        since=header.since,
        position=header.position,
        round=header.round,
        repeats=header.repeats,
        announced=header.announced,
        devices={status.device: status for status in header.devices},
        expected=frozenset(header.expected),
        counted=frozenset(header.counted),
    )
