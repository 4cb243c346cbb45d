"""Counts and times of a fleet of simulated devices."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fedfmsl.protocol.messages import Ack, Round, Verdict


@dataclass
class RoundTimes:
    """First announcement and last acknowledgement of a round, in seconds since the fleet's start."""

    stage: str
    announced: float
    last_ack: float = 0.0


@dataclass
class Tally:
    """`updates`: updates computed; `sends`: including retransmits; bytes are of payloads. `acks`: by verdict.
    `counted`: by round, the devices whose update was accepted, now or before. `started`: of the system's monotonic
    clock."""

    updates: int = 0
    sends: int = 0
    connections: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    acks: dict[str, int] = field(default_factory=dict)
    counted: dict[int, list[str]] = field(default_factory=dict)
    rounds: dict[int, RoundTimes] = field(default_factory=dict)
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def add_round(self, announced: Round) -> None:
        self.rounds.setdefault(announced.round, RoundTimes(announced.stage.value, self._now()))

    def add_ack(self, ack: Ack) -> None:
        self.acks[ack.verdict.value] = self.acks.get(ack.verdict.value, 0) + 1
        if ack.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE):
            self.counted.setdefault(ack.round, []).append(ack.device)
        if ack.round in self.rounds:
            self.rounds[ack.round].last_ack = self._now()

    def _now(self) -> float:
        return round(time.monotonic() - self.started, 4)
