"""Figures of a running server, counted since its start. `trainer_server.service.metrics` shows them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from trainer_server.coordinator.privacy_budget import NoisedRounds
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.state import Plan, State
from trainer_server.storage.run_store import RunStore

# Of the models that devices measure. Devices could report others without end.
ACCURACIES = ("global", "global_prior", "local_expert", "mofm", "local_only", "novel")
CLOSED, REPEATED = "closed", "repeated"  # results of a round


@dataclass
class Figures:
    """`rounds`: closed ones by result. `round_seconds`: how long they were open, together. `closings` rounds took
    `closing_seconds` to close: aggregation, and the announcement of the next round. `bytes_up`: of accepted updates.
    `refused`: messages by reason. `noised`: rounds of the whole run.
    """

    noised: NoisedRounds = field(default_factory=NoisedRounds)
    started: float = field(default_factory=time.time)
    rounds: Counter[str] = field(default_factory=lambda: Counter({CLOSED: 0, REPEATED: 0}))
    round_seconds: float = 0.0
    closings: int = 0
    closing_seconds: float = 0.0
    updates: int = 0
    stragglers: int = 0
    bytes_up: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    held_out: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_run(cls, store: RunStore) -> Figures:
        origin = store.origin
        return cls(NoisedRounds.of(store.rounds.counts() if origin.config.privacy else {}, origin.spent_before))

    def closed(self, record: ClosedRound, seconds: float) -> None:
        """`seconds`: how long the closing took."""
        self.rounds[REPEATED if record.repeated else CLOSED] += 1
        self.round_seconds += record.seconds
        self.closings += 1
        self.closing_seconds += seconds
        self.updates += len(record.updates)
        self.stragglers += len(record.missing)
        self.bytes_up += sum(record.bytes_up.values())
        self.noised.add(record.round.stage, bool(record.repeated))
        self.held_out |= {name: value for name, value in record.held_out.items() if name in ACCURACIES}


@dataclass(frozen=True)
class Snapshot:
    """A moment of a running server. `queued`: messages that wait. `uploads`: see `Uploads.incomplete`. Certificates:
    unix seconds, 0 without one."""

    plan: Plan
    state: State
    figures: Figures
    folder: Path
    connected: bool = True
    queued: int = 0
    uploads: int = 0
    certificate_until: float = 0.0
    broker_certificate_until: float = 0.0
