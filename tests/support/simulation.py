"""A run of the real server with simulated devices."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.simulated import device_names
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Ack, Message, Round, Stage, Verdict
from support.brokers import RestartableBroker
from support.fault_table import COUNTS, Trial
from support.processes import Observer, Process, Processes
from support.run_oracle import Findings, Reference, examine
from trainer_server.coordinator.state import Key

RUN = "faults"  # the same in every run: it is part of the hashes
STAGE1, STAGE2 = 3, 1
ROUND_TIMEOUT = 80  # seconds; no test may reach it


@dataclass
class Simulation:
    """A server and simulated devices on one broker, which either may reach through a proxy."""

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

    def start_server(
        self,
        *arguments: str,
        url: str | None = None,
        launcher: Sequence[str] = ("-m",),
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """The same command at each start."""
        server = self.processes.start_module(
            f"server-{len(self.servers)}",
            "trainer_server",
            *("start", "--run", RUN, "--bundle", str(self.bundle.root), "--devices", str(self.devices)),
            *("--broker", url or self.broker.url, "--out", str(self.out), "--audit"),
            *("--stage1-rounds", str(STAGE1), "--stage2-rounds", str(STAGE2), "--max-level", "1", "--no-secure-sums"),
            *("--head", "class-means"),
            *("--round-timeout", str(ROUND_TIMEOUT), *arguments),
            launcher=launcher,
            environment=environment,
        )
        self.servers.append(server)
        return server

    def start_fleet(
        self,
        *arguments: str,
        url: str | None = None,
        delay: tuple[float, float] = (0.0, 0.0),
        first: int = 0,
        devices: int | None = None,
    ) -> Process:
        """Starts `devices` simulated devices from number `first` on, by default all."""
        fleet = self.processes.start_module(
            f"fleet-{len(self.fleets)}",
            "benchmarks.simulated",
            *("--run", RUN, "--bundle", str(self.bundle.root)),
            *("--first", str(first), "--devices", str(devices or self.devices)),
            *("--broker", url or self.broker.url, "--delay", *map(str, delay), *arguments),
        )
        self.fleets.append(fleet)
        return fleet

    def finish(self, expelled: Collection[Process] = ()) -> Outcome:
        """The outcome after the last server and the fleets have exited: with 0, except for the `expelled` fleets."""
        for process in (self.servers[-1], *self.fleets):
            ended = process.wait()
            good = (ended.code == 0) != (process in expelled)
            assert good, (process.log.name, ended.code, ended.stdout[-2000:], ended.stderr[-2000:])
        return Outcome(self.out, [json.loads(fleet.stdout.splitlines()[-1]) for fleet in self.fleets])


@dataclass(frozen=True)
class Outcome:
    """A finished run: the server's folder and the tally of each fleet."""

    out: Path
    tallies: list[dict[str, Any]]

    @property
    def connections(self) -> int:
        return sum(tally["connections"] for tally in self.tallies)

    @property
    def acknowledged(self) -> set[Key]:
        """Updates that were acknowledged as accepted or duplicate."""
        return {
            (int(number), name)
            for tally in self.tallies
            for number, names in tally["counted"].items()
            for name in names
        }

    def trial(self, undisturbed: Reference, recovery: float | None = None, times: int = 1) -> Trial:
        return trial_of(examine(self.out, self.acknowledged, undisturbed), recovery, times)


def trial_of(findings: Findings, recovery: float | None = None, times: int = 1) -> Trial:
    """Asserts that no update is lost or counted twice, and that no round reached its deadline."""
    assert (findings.lost, findings.double, findings.repeated, findings.missing) == (0, 0, 0, {}), findings
    return Trial(**{name: getattr(findings, name) for name in COUNTS}, recovery=recovery, times=times)


def in_stage_1(observer: Observer, index: int = 1) -> Round:
    """The round of stage 1 with that index, after its first accepted update."""
    begun = observer.wait(Round, lambda r: r.stage is Stage.GLOBAL and r.index == index, f"round {index} of stage 1")
    observer.wait(Ack, lambda a: a.round == begun.round and a.verdict is Verdict.ACCEPTED, "its first update")
    return begun


@contextmanager
def recovering(simulation: Simulation, observer: Observer) -> Iterator[list[float]]:
    """Yields a list that later holds the seconds from the end of the block until every device has an accepted update or
    the run is finished. The observer also reconnects, and may miss updates meanwhile."""
    seconds: list[float] = []
    yield seconds
    since, ended = observer.catch_up(), time.monotonic()
    if any(isinstance(message, Round) and message.stage is Stage.FINISHED for message in observer.seen):
        since = 0  # the run finished during the fault
    for device in device_names(simulation.devices):
        observer.wait(Message, partial(_accepted_or_over, device), f"an update of {device} after the fault", since)
    seconds.append(time.monotonic() - ended)


def _accepted_or_over(device: str, message: Message) -> bool:
    if isinstance(message, Ack):
        return message.device == device and message.verdict is Verdict.ACCEPTED
    return isinstance(message, Round) and message.stage is Stage.FINISHED
