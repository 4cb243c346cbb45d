"""A run of the real server with simulated devices."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfmsl.protocol.messages import Ack, Round, Stage, Verdict
from fedfmsl.protocol.task_bundle import TaskBundle
from support.brokers import RestartableBroker
from support.fault_records import Row
from support.processes import RUN_SECONDS, Observer, Process, Processes
from support.run_oracle import Findings, Reference, Undisturbed, examine
from trainer_server.coordinator.state import Key

RUN = "faults"  # the same in every run: it is part of the hashes
STAGE1, STAGE2 = 3, 1  # rounds
ROUNDS_PER_FAULT = 4  # for the fault, its recovery and the random moment of the next
ROUND_TIMEOUT = 80  # seconds; no test may reach it


@dataclass
class Simulation:
    """A server and simulated devices on one broker, which either may reach through a proxy."""

    processes: Processes
    broker: RestartableBroker
    bundle: TaskBundle
    folder: Path
    devices: int = 6
    stage1: int = STAGE1
    fleets: list[Process] = field(default_factory=list)
    servers: list[Process] = field(default_factory=list)

    @classmethod
    def for_faults(
        cls, times: int, processes: Processes, broker: RestartableBroker, bundle: TaskBundle, folder: Path
    ) -> Simulation:
        return cls(processes, broker, bundle, folder, stage1=max(STAGE1, times * ROUNDS_PER_FAULT))

    @property
    def out(self) -> Path:
        return self.folder / "server"

    def check(self, row: Row, undisturbed: Undisturbed, expelled: Collection[Process] = ()) -> Outcome:
        """The outcome of the finished run, which the oracle has examined."""
        outcome = self.finish(expelled)
        row.add(outcome.findings(undisturbed(self.devices, self.stage1)))
        return outcome

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
            *("--stage1-rounds", str(self.stage1), "--stage2-rounds", str(STAGE2), "--max-level", "1"),
            *("--no-secure-sums", "--head", "class-means"),
            *("--min-updates", str(self.devices)),  # no round closes without a device, so every round can be compared
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
        launcher: Sequence[str] = ("-m",),
    ) -> Process:
        """Starts `devices` simulated devices from number `first` on, by default all."""
        fleet = self.processes.start_module(
            f"fleet-{len(self.fleets)}",
            "benchmarks.simulated",
            *("--run", RUN, "--bundle", str(self.bundle.root)),
            *("--first", str(first), "--devices", str(devices or self.devices)),
            *("--broker", url or self.broker.url, "--delay", *map(str, delay), *arguments),
            launcher=launcher,
        )
        self.fleets.append(fleet)
        return fleet

    def finish(self, expelled: Collection[Process] = ()) -> Outcome:
        """The outcome after the last server and the fleets have exited: with 0, except for the `expelled` fleets."""
        for process in (self.servers[-1], *self.fleets):
            ended = process.wait(RUN_SECONDS)
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

    def findings(self, undisturbed: Reference) -> Findings:
        return examine(self.out, self.acknowledged, undisturbed)


def in_stage_1(observer: Observer, index: int = 1) -> Round:
    """The round of stage 1 with that index, after its first accepted update."""
    begun = observer.wait(Round, lambda r: r.stage is Stage.GLOBAL and r.index == index, f"round {index} of stage 1")
    observer.wait(Ack, lambda a: a.round == begun.round and a.verdict is Verdict.ACCEPTED, "its first update")
    return begun
