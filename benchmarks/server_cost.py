"""python -m benchmarks.server_cost: processor time and memory of the server per update, ours and Flower's SuperLink.

Flower needs an environment of its own, for its SuperLink, its ServerApp and nodes that send updates of the same size:

    python -m venv flower
    flower/bin/pip install flwr==1.42.0
    python -m benchmarks.server_cost --flower-python flower/bin/python

Ours is a run of `benchmarks.load` with int8 updates and a connection for each device, which fetches each round's
globals. The CPU seconds are those between the first round and the last one, without the start of any process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import typer

from benchmarks.layouts import layout_bundle
from benchmarks.load import measure
from benchmarks.process_tree import ProcessTree
from benchmarks.simulated import SPARE_FILES, allow_files
from devices.trial.processes import free_port, wait_for_port
from fedfmsl.common.cli import application, console
from fedfmsl.errors import RunError

START_SECONDS = 120.0
NODES = Path(__file__).with_name("flower_load.py")
CONNECTION = '[superlink]\ndefault = "load"\n[superlink.load]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
APP = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "load"
version = "1.0.0"
description = "Updates without training."
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "load"
[tool.flwr.app.components]
serverapp = "load.flower_load:server"
clientapp = "load.flower_load:client"
[tool.flwr.app.config]
rounds = 1
nodes = 1
values = 1
"""

app = application()


@dataclass(frozen=True)
class Cost:
    """`ms`: CPU milliseconds of the server per update. `broker_ms`: those of the broker. `peak_mb`: of the server."""

    name: str
    ms: float
    broker_ms: float
    peak_mb: float


@app.command()
def server_cost(
    flower_python: Path = typer.Option(help="Python of an environment with flwr."),
    devices: int = typer.Option(100, min=2, help="Devices, and nodes of Flower."),
    rounds: int = typer.Option(5, min=3, help="Rounds of stage 1."),
) -> None:
    """Measure ours and Flower's with the same number of devices and updates of the same size."""
    allow_files(devices + SPARE_FILES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = layout_bundle(folder / "bundle")
        console.print("ours", style="bold")
        ours = _ours(folder, bundle.root, devices, rounds)
        console.print("Flower", style="bold")
        flower = _flower(folder, flower_python.absolute(), devices, rounds, bundle.expert.size(1))
    print(f"{devices} devices, {rounds} rounds, updates of {bundle.expert.size(1)} 8-bit values.\n")
    print("| server | CPU ms per update | broker, CPU ms | server, peak MB |")
    print("|---|---|---|---|")
    for cost in (ours, flower):
        print(f"| {cost.name} | {cost.ms:.2f} | {cost.broker_ms:.2f} | {cost.peak_mb:.0f} |")
    print(f"\nFlower takes {flower.ms / (ours.ms + ours.broker_ms):.1f} times the CPU of server and broker together.")


def _ours(folder: Path, bundle: Path, devices: int, rounds: int) -> Cost:
    found = measure(folder, bundle, devices, rounds, ["--encoding", "int8", "--head-sums", "none"])
    return Cost("ours, and mosquitto", found.ms, found.broker_ms, found.processes["server"].peak_rss_mb)


def _flower(folder: Path, python: Path, nodes: int, rounds: int, values: int) -> Cost:
    """Raises RunError if Flower fails or does not start in time."""
    port, code, home = free_port(), folder / "app" / "load", folder / "home"
    code.mkdir(parents=True)
    home.mkdir()
    (code / "__init__.py").touch()
    shutil.copy(NODES, code)
    (code.parent / "pyproject.toml").write_text(APP)
    (home / "config.toml").write_text(CONNECTION.format(port=port))
    own = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    environment = {**os.environ, **own}
    log = (folder / "flower.log").open("w+")
    started: list[subprocess.Popen[str]] = []
    trees: list[ProcessTree] = []

    def start(*command: str, is_read: bool = False) -> subprocess.Popen[str]:
        stdout = subprocess.PIPE if is_read else log
        process = subprocess.Popen(command, env=environment, text=True, cwd=folder, stdout=stdout, stderr=log)
        started.append(process)
        trees.append(ProcessTree(psutil.Process(process.pid)))
        return process

    try:
        link = start("flower-superlink", "--insecure", "--port", str(port), "--disable-runtime-dependency-installation")
        if not wait_for_port(port, link, START_SECONDS):
            raise RunError(f"the SuperLink did not start: {_tail(log.name)}")
        fleet = start(str(python), str(NODES), f"127.0.0.1:{port}", *map(str, (nodes, rounds, values)), is_read=True)
        return _cost(fleet, trees[0], environment, code.parent, {"nodes": nodes, "rounds": rounds, "values": values})
    except StopIteration as error:
        raise RunError(f"Flower's nodes ended early: {_tail(log.name)}") from error
    finally:
        for child in [child for tree in trees for child in tree.children()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()  # the SuperLink does not end its ServerApp
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait()
        log.close()


def _cost(
    fleet: subprocess.Popen[str],
    link: ProcessTree,
    environment: Mapping[str, str],
    folder: Path,
    config: Mapping[str, int],
) -> Cost:
    """From the beginning of the second round to that of the last one. Raises StopIteration if the nodes end early."""
    assert fleet.stdout is not None
    lines = iter(fleet.stdout)
    while "registered" not in next(lines):
        pass
    settings = " ".join(f"{name}={value}" for name, value in config.items())
    command = ["flwr", "run", str(folder), "load", "--run-config", settings]
    ran = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    if ran.returncode:
        raise RunError(f"flwr run failed: {(ran.stdout + ran.stderr)[-500:]}")
    seconds, last = {}, config["rounds"] - 1
    while last not in seconds:
        line = next(lines)
        if line.startswith("round"):
            seconds[int(line.split()[1])] = link.processor_seconds()
            link.add_memory()
    time.sleep(1.0)
    link.add_memory()
    ms = 1000 * (seconds[last] - seconds[1]) / (config["nodes"] * (last - 1))
    return Cost("Flower's SuperLink and ServerApp", ms, 0.0, link.peak_mb)


def _tail(log: str) -> str:
    return Path(log).read_text()[-500:]


if __name__ == "__main__":
    app()
