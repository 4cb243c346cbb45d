"""python -m benchmarks.load: round time and resources of one server and one mosquitto, by number of devices.

Each number of devices is a whole run with a real mosquitto, the real server and a simulated fleet, each in its own
process. The fleet is `benchmarks.simulated`, with a connection for each device, or with --shared `benchmarks.crowd`.
Updates have the size of ViT-B/16 at level 1. The resources are read from /proc.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import typer

from benchmarks.layouts import layout_bundle
from benchmarks.simulated import SPARE_FILES, allow_files
from devices.trial.processes import free_port, last_line, wait_for_port
from fedfmsl.common.cli import application, console
from fedfmsl.errors import BrokerError, ConfigError, RunError
from fedfmsl.protocol.messages import Stage
from trainer_server.storage.run_store import RunStore

READ_SECONDS = 0.2
BROKER_SECONDS = 10
BROKER_SETTINGS = "allow_anonymous true\nmax_queued_messages 0\nmessage_size_limit 262144\n"

COLUMNS = (
    "devices",
    "s per round",
    "longest",
    "server, ms per update",
    "lost",
    "server, peak MB",
    "written, MB",
    "wall, s",
    "server CPU",
    "broker",
    "fleet",
)

app = application()


@dataclass
class MonitoredProcess:
    """A process, and its resource use at the last reading."""

    process: subprocess.Popen[str]
    peak_rss_mb: float = 0.0
    cpu_seconds: float = 0.0
    written_mb: float = 0.0
    readings: list[tuple[float, float]] = field(default_factory=list)  # seconds of the monotonic clock, CPU seconds

    def read(self) -> None:
        """Updates the figures. A process that has ended keeps those of the last reading."""
        status = Path("/proc", str(self.process.pid), "status")  # psutil has no peak memory on Linux
        try:
            process = psutil.Process(self.process.pid)
            times, written = process.cpu_times(), process.io_counters().write_bytes
            peak = dict(line.split(":", 1) for line in status.read_text().splitlines())["VmHWM"]
        except (OSError, KeyError, psutil.Error):
            return
        self.peak_rss_mb = int(peak.split()[0]) / 1024
        self.cpu_seconds = times.user + times.system
        self.written_mb = written / 1e6
        self.readings.append((time.monotonic(), self.cpu_seconds))

    def cpu_between(self, start: float, end: float) -> float:
        """CPU seconds between two times of the monotonic clock, from the nearest readings."""
        first, last = (min(self.readings, key=lambda one: abs(one[0] - moment)) for moment in (start, end))
        return last[1] - first[1]


@dataclass
class Measured:
    """The measurements of one run. `size`: bytes of an update of stage 1 on the wire.

    `rounds`: seconds of each round of stage 1, from its announcement to the next one. CPU seconds and `wall` are of the
    whole run. `ms` and `broker_ms`: CPU milliseconds of server and broker per update of stage 1, with its aggregation.
    `lost`: updates of selected devices that did not count, in all rounds.
    """

    devices: int
    size: float
    rounds: list[float]
    wall: float
    ms: float
    broker_ms: float
    lost: int
    processes: dict[str, MonitoredProcess] = field(repr=False)

    @property
    def mean(self) -> float:
        return sum(self.rounds) / len(self.rounds)

    def cells(self) -> list[str]:
        server = self.processes["server"]
        cpu = [f"{process.cpu_seconds:.1f}" for process in self.processes.values()]
        return [
            f"{self.devices:,}",
            f"{self.mean:.2f}",
            f"{max(self.rounds):.2f}",
            f"{self.ms:.2f}",
            str(self.lost),
            f"{server.peak_rss_mb:.0f}",
            f"{server.written_mb:.0f}",
            f"{self.wall:.1f}",
            *cpu,
        ]


@app.command()
def load(
    devices: str = typer.Option("10,100,1000", help="Numbers of devices, separated by commas."),
    rounds: int = typer.Option(10, min=1, help="Rounds of stage 1."),
    server: list[str] = typer.Option([], help="Additional argument of the server; may be repeated."),
    shared: bool = typer.Option(False, help="All devices share one connection (`benchmarks.crowd`)."),
    work: Path | None = typer.Option(None, help="Folder for bundle, broker and runs. Default: a temporary folder."),
) -> None:
    """Measure round time and resources of the server, by number of devices."""
    try:
        counts = [int(count) for count in devices.split(",")]
    except ValueError as error:
        raise ConfigError(f"--devices {devices!r} is not a list of numbers like 10,100,1000") from error
    allow_files(SPARE_FILES + (0 if shared else max(counts)))  # mosquitto inherits the limit
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        bundle = layout_bundle(folder / "bundle")
        results = []
        for count in counts:
            console.print(f"{count} devices", style="bold")
            results.append(measure(folder, bundle.root, count, rounds, server, shared))
    _show(results)


def measure(
    folder: Path, bundle: Path, devices: int, rounds: int, extra: Sequence[str], shared: bool = False
) -> Measured:
    """One run. Raises RunError if the server or the fleet fails, BrokerError if mosquitto does not start."""
    port = free_port()
    out = folder / f"{devices}-devices"
    out.mkdir()
    (out / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\n{BROKER_SETTINGS}")
    url = ["--run", "load", "--bundle", str(bundle), "--devices", str(devices), "--broker", f"mqtt://127.0.0.1:{port}"]
    stages = ["--stage1-rounds", str(rounds), "--stage2-rounds", "1", "--max-level", "1", "--no-secure-sums"]
    module = [sys.executable, "-m"]
    processes: dict[str, MonitoredProcess] = {}
    started = time.monotonic()
    try:
        processes["broker"] = _start(out, "broker", [_mosquitto(), "-c", str(out / "mosquitto.conf")])
        if not wait_for_port(port, processes["broker"].process, BROKER_SECONDS):
            raise BrokerError(f"mosquitto did not start: {last_line(out / 'broker.log')}")
        arguments = [*url, "--out", str(out / "server"), *stages, *extra]
        processes["server"] = _start(out, "server", [*module, "trainer_server", "start", *arguments])
        fleet = "benchmarks.crowd" if shared else "benchmarks.simulated"
        processes["fleet"] = _start(out, "fleet", [*module, fleet, *url])
        while any(processes[name].process.poll() is None for name in ("server", "fleet")):
            for name, monitored in processes.items():
                monitored.read()
                if monitored.process.poll():
                    raise RunError(f"{name} failed with {devices} devices: {last_line(out / f'{name}.log')}")
            time.sleep(READ_SECONDS)
        processes["broker"].read()
    finally:
        for monitored in processes.values():
            monitored.process.terminate()
            monitored.process.wait()
    tally = json.loads((out / "fleet.log").read_text().splitlines()[-1])
    order = ("server", "broker", "fleet")
    wall = time.monotonic() - started
    in_order = {name: processes[name] for name in order}
    closed = [summary for summary, _ in RunStore(out / "server").rounds.summaries()]
    trained = [summary for summary in closed if summary.stage is Stage.GLOBAL]
    updates = sum(summary.answered for summary in trained)
    size = sum(summary.bytes_up for summary in trained) / updates
    start, end = _stage1(tally)
    ms, broker_ms = (1000 * processes[name].cpu_between(start, end) / updates for name in ("server", "broker"))
    lost = sum(summary.missing for summary in closed)
    return Measured(devices, size, _seconds(tally), wall, ms, broker_ms, lost, in_order)


def _stage1(tally: dict[str, Any]) -> tuple[float, float]:
    """When stage 1 began, and when the round after it was announced, on the monotonic clock."""
    rounds = list(tally["rounds"].values())
    trained = [index for index, one in enumerate(rounds) if one["stage"] == "global"]
    start, end = rounds[trained[0]]["announced"], rounds[trained[-1] + 1]["announced"]
    return tally["started"] + start, tally["started"] + end


def _seconds(tally: dict[str, Any]) -> list[float]:
    """Seconds of each round of stage 1, from announcement to next announcement."""
    rounds = list(tally["rounds"].values())
    return [
        after["announced"] - before["announced"] for before, after in pairwise(rounds) if before["stage"] == "global"
    ]


def _start(folder: Path, name: str, command: Sequence[str]) -> MonitoredProcess:
    with (folder / f"{name}.log").open("w") as log:
        return MonitoredProcess(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True))


def _mosquitto() -> str:
    """Raises BrokerError if it is not installed."""
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise BrokerError("mosquitto is not installed; apt-get install mosquitto")
    return found


def _show(results: Sequence[Measured]) -> None:
    """Prints a Markdown table."""
    print(f"Updates of {results[0].size / 1e3:.0f} KB; seconds per round of stage 1; CPU seconds of the whole run.\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for result in results:
        print(f"| {' | '.join(result.cells())} |")
    print()
    if len(results) > 1:
        first, last = (result.processes["server"].peak_rss_mb for result in (results[0], results[-1]))
        print(f"Server's peak memory, {results[-1].devices} devices to {results[0].devices}: {last / first:.2f} times.")
    busiest = max(results[-1].processes.items(), key=lambda item: item[1].cpu_seconds)
    share = busiest[1].cpu_seconds / results[-1].wall
    print(f"Busiest at {results[-1].devices} devices: {busiest[0]}, {share:.0%} of one core over the run.")


if __name__ == "__main__":
    app()
