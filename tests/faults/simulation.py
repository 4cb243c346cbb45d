"""One run of the real server with simulated devices, and the question after every fault: is anything lost or counted
twice?"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from brokers import RestartableBroker
from processes import Observer, Process, Processes
from table import Trial

from benchmarks.simulated import device_names
from protocol.bundle import Bundle
from protocol.messages import Ack, Round, Stage, Verdict
from trainer_server.store import RunStore

RUN = "faults"  # of every run: it is part of what is hashed
STAGE1, STAGE2 = 3, 1
ROUND_TIMEOUT = 60  # seconds; nothing here may need them
Results = list[tuple[str, int, int, str, str, str]]


@dataclass
class Simulation:
    """A server and simulated devices on one broker. Either may be given another address of it, a proxy's."""

    processes: Processes
    broker: RestartableBroker
    bundle: Bundle
    folder: Path
    devices: int = 6
    fleets: list[Process] = field(default_factory=list)
    servers: list[Process] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return self.folder / "server"

    def start_server(self, *arguments: str, url: str | None = None, launcher: Sequence[str] = ("-m",)) -> Process:
        """The same command each time."""
        server = self.processes.start_module(
            f"server-{len(self.servers)}",
            "trainer_server",
            *("start", "--run", RUN, "--bundle", str(self.bundle.root), "--devices", str(self.devices)),
            *("--broker", url or self.broker.url, "--out", str(self.out), "--audit"),
            *("--stage1-rounds", str(STAGE1), "--stage2-rounds", str(STAGE2), "--max-level", "1"),
            *("--round-timeout", str(ROUND_TIMEOUT), *arguments),
            launcher=launcher,
        )
        self.servers.append(server)
        return server

    def start_fleet(self, *arguments: str, url: str | None = None, think: tuple[float, float] = (0.0, 0.0)) -> Process:
        fleet = self.processes.start_module(
            f"fleet-{len(self.fleets)}",
            "benchmarks.simulated",
            *("--run", RUN, "--bundle", str(self.bundle.root), "--devices", str(self.devices)),
            *("--broker", url or self.broker.url, "--think", *map(str, think), *arguments),
        )
        self.fleets.append(fleet)
        return fleet

    def finish(self) -> Outcome:
        """Once the last server and the last fleet have left in good order."""
        for process in (self.servers[-1], self.fleets[-1]):
            ended = process.wait()
            assert ended.code == 0, (process.log.name, ended.code, ended.stdout[-2000:], ended.stderr[-2000:])
        return Outcome(closed_rounds(self.out), json.loads(self.fleets[-1].stdout.splitlines()[-1]))


def closed_rounds(out: Path) -> list[dict[str, Any]]:
    """The server's own record."""
    return [closed.model_dump(mode="json") for closed in RunStore(out).rounds()]


@dataclass(frozen=True)
class Outcome:
    rounds: list[dict[str, Any]]
    tally: dict[str, Any]  # of the fleet

    @property
    def results(self) -> Results:
        """What each round that led to something started from: its stage, index and level, and the hashes of its
        globals. The last, which measures, starts from what the run has come to."""
        return [
            tuple(line["round"][key] for key in ("stage", "index", "level", "expert", "start", "gate"))
            for line in self.rounds
            if not line["repeated"]
        ]

    @property
    def lost(self) -> int:
        """Updates that a device was told are counted, and that the server's record does not have."""
        recorded = {(line["round"]["round"], name) for line in self.rounds for name in line["updates"]}
        told = {(int(number), name) for number, names in self.tally["counted"].items() for name in names}
        return len(told - recorded)

    @property
    def repeated(self) -> int:
        return sum(bool(line["repeated"]) for line in self.rounds)

    @property
    def complete(self) -> list[bool]:
        """Of each round that led to something: whether it has an update of every device."""
        everybody = max(len(line["updates"]) for line in self.rounds)
        return [len(line["updates"]) == everybody for line in self.rounds if not line["repeated"]]

    def double(self, undisturbed: Results) -> int:
        """Rounds with another result than those of the undisturbed run, though they have the same updates: one of them
        was counted twice, or not as it was sent. A round without a device that was away leads elsewhere, so that what
        comes after it cannot be compared."""
        same = [ours == theirs for ours, theirs in zip(self.results, undisturbed, strict=True)]
        comparable = [all(self.complete[:index]) for index in range(len(same))]
        return sum(compare and not equal for equal, compare in zip(same, comparable, strict=True))

    def trial(self, undisturbed: Results, recovery: float | None = None) -> Trial:
        """Asserts what must hold after every fault: no round has waited for its deadline, nothing is lost, nothing
        counted twice."""
        late = {line["round"]["round"]: line["missing"] for line in self.rounds if line["missing"]}
        trial = Trial(self.lost, self.double(undisturbed), self.repeated, recovery)
        assert (trial, late) == (Trial(0, 0, 0, recovery), {})
        return trial


def in_stage_1(observer: Observer, index: int = 1) -> Round:
    """The round of stage 1 with that index, when its first update has been accepted."""
    begun = observer.wait(Round, lambda r: r.stage is Stage.GLOBAL and r.index == index, f"round {index} of stage 1")
    observer.wait(Ack, lambda a: a.round == begun.round and a.verdict is Verdict.ACCEPTED, "its first update")
    return begun


@contextmanager
def recovering(simulation: Simulation, observer: Observer) -> Iterator[list[float]]:
    """Yields what will hold how long it took, from leaving the block, until every device had an update accepted."""
    seconds: list[float] = []
    yield seconds
    since, mended = observer.catch_up(), time.monotonic()
    for device in device_names(simulation.devices):
        observer.wait(Ack, partial(_accepted, device), f"an update of {device} after the fault", since)
    seconds.append(time.monotonic() - mended)


def _accepted(device: str, ack: Ack) -> bool:
    return ack.device == device and ack.verdict is Verdict.ACCEPTED
