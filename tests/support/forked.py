"""Commands in processes that are forked from one with the imports of ours, which take a process of its own a second."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver, get_context
from pathlib import Path
from runpy import run_module as run_as_main

from support.processes import SECONDS, Ended

# What the commands import. Not the module of a command itself, which every process executes.
IMPORTED = (
    "devices.provisioning.fleet",
    "devices.trial.run",
    "edge_runtime.daemon.launch",
    "edge_runtime.inference.stream",
    "edge_runtime.preflight",
    "trainer_server.inspect",
    "trainer_server.settings",
)


def fork_module(
    module: str, *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Ended:
    """What `support.processes.run_module` returns, sooner. For commands of which a test starts many."""
    _start()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        given = (module, arguments, out, err, cwd or Path.cwd(), dict(environment or {}))
        process = get_context("forkserver").Process(target=_run, args=given)
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"waited {SECONDS:.0f} s for {module} {' '.join(arguments)} to end")
        return Ended(process.exitcode, out.read_text(), err.read_text())


@cache
def _start() -> None:
    """Starts the process that forks. Consoles read COLUMNS when they are imported."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        forkserver.set_forkserver_preload([*IMPORTED])
        forkserver.ensure_running()
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _run(
    module: str, arguments: tuple[str, ...], out: Path, err: Path, cwd: Path, environment: Mapping[str, str]
) -> None:
    for path, number in ((Path(os.devnull), 0), (out, 1), (err, 2)):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv[1:] = arguments
    run_as_main(module, run_name="__main__", alter_sys=True)
