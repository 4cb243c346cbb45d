"""One run of the real server with simulated devices."""

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

RUN = "faults"  # of every run: it is part of what is hashed
STAGE1, STAGE2 = 3, 1
ROUND_TIMEOUT = 80  # seconds; nothing here may need them


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

    def start_server(
        self,
        *arguments: str,
        url: str | None = None,
        launcher: Sequence[str] = ("-m",),
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """The same command each time."""
        server = self.processes.start_module(
            f"server-{len(self.servers)}",
            "trainer_server",
            *("start", "--run", RUN, "--bundle", str(self.bundle.root), "--devices", str(self.devices)),
            *("--broker", url or self.broker.url, "--out", str(self.out), "--audit"),
            *("--stage1-rounds", str(STAGE1), "--stage2-rounds", str(STAGE2), "--max-level", "1"),
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
        think: tuple[float, float] = (0.0, 0.0),
        first: int = 0,
        devices: int | None = None,
    ) -> Process:
        """All devices, or so many from the first on."""
        fleet = self.processes.start_module(
            f"fleet-{len(self.fleets)}",
            "benchmarks.simulated",
            *("--run", RUN, "--bundle", str(self.bundle.root)),
            *("--first", str(first), "--devices", str(devices or self.devices)),
            *("--broker", url or self.broker.url, "--think", *map(str, think), *arguments),
        )
        self.fleets.append(fleet)
        return fleet

    def finish(self, driven_out: Collection[Process] = ()) -> Outcome:
        """Once the last server and the fleets have left: in good order, but for those that had to go."""
        for process in (self.servers[-1], *self.fleets):
            ended = process.wait()
            good = (ended.code == 0) != (process in driven_out)
            assert good, (process.log.name, ended.code, ended.stdout[-2000:], ended.stderr[-2000:])
        return Outcome(self.out, [json.loads(fleet.stdout.splitlines()[-1]) for fleet in self.fleets])


@dataclass(frozen=True)
class Outcome:
    """A run that has ended: the server's folder, and what each fleet has seen."""

    out: Path
    tallies: list[dict[str, Any]]

    @property
    def connections(self) -> int:
        return sum(tally["connections"] for tally in self.tallies)

    @property
    def told(self) -> set[Key]:
        """Updates whose device was told that they count."""
        return {
            (int(number), name)
            for tally in self.tallies
            for number, names in tally["counted"].items()
            for name in names
        }

    def trial(self, undisturbed: Reference, recovery: float | None = None, times: int = 1) -> Trial:
        return judged(examine(self.out, self.told, undisturbed), recovery, times)


def judged(findings: Findings, recovery: float | None = None, times: int = 1) -> Trial:
    """Asserts what must hold after every fault: nothing is lost, nothing counted twice, and no round has waited for its
    deadline."""
    assert (findings.lost, findings.double, findings.repeated, findings.missing) == (0, 0, 0, {}), findings
    return Trial(**{name: getattr(findings, name) for name in COUNTS}, recovery=recovery, times=times)


def in_stage_1(observer: Observer, index: int = 1) -> Round:
    """The round of stage 1 with that index, when its first update has been accepted."""
    begun = observer.wait(Round, lambda r: r.stage is Stage.GLOBAL and r.index == index, f"round {index} of stage 1")
    observer.wait(Ack, lambda a: a.round == begun.round and a.verdict is Verdict.ACCEPTED, "its first update")
    return begun


@contextmanager
def recovering(simulation: Simulation, observer: Observer) -> Iterator[list[float]]:
    """Yields what will hold how long it took, from leaving the block, until every device had an update accepted, or the
    run was over: the observer too has to find the broker again, and may have missed the rest."""
    seconds: list[float] = []
    yield seconds
    since, mended = observer.catch_up(), time.monotonic()
    if any(isinstance(message, Round) and message.stage is Stage.FINISHED for message in observer.seen):
        since = 0  # a slow fault: all is over
    for device in device_names(simulation.devices):
        observer.wait(Message, partial(_accepted_or_over, device), f"an update of {device} after the fault", since)
    seconds.append(time.monotonic() - mended)


def _accepted_or_over(device: str, message: Message) -> bool:
    if isinstance(message, Ack):
        return message.device == device and message.verdict is Verdict.ACCEPTED
    return isinstance(message, Round) and message.stage is Stage.FINISHED
