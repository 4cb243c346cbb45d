"""The processes of a trial: broker, server and daemons, watched until the run has finished."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from fedfmsl.errors import RunError

BROKER_SECONDS = 20  # until the embedded broker accepts connections
POLL_SECONDS = 0.25
TERMINATE_SECONDS = 10  # from SIGTERM to SIGKILL


@dataclass
class LoggedProcess:
    """`python -m arguments`, with its output in a log file."""

    name: str
    arguments: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.arguments], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def last_line(self) -> str:
        return last_line(self.log)


class Processes:
    """The processes of a trial. Leaving the context ends them.

    A process that is killed by a signal is started again with the same command, as a service manager does.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started: list[LoggedProcess] = []
        self._broker: LoggedProcess | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for each in reversed(self._started):
            each.process.terminate()
        for each in self._started:
            try:
                each.process.wait(TERMINATE_SECONDS)
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()

    def start(self, name: str, *arguments: str) -> LoggedProcess:
        started = LoggedProcess(name, arguments, self._logs / f"{name}.log")
        self._started.append(started)
        return started

    def start_broker(self) -> str:
        """Starts the embedded broker on a free port and returns its address. Raises RunError if it does not start."""
        port = free_port()
        broker = self._broker = self.start("broker", "devices.trial.broker", "--port", str(port))
        if not wait_for_port(port, broker.process, BROKER_SECONDS):
            raise RunError(f"the embedded broker did not start: {broker.last_line()}")
        return f"mqtt://127.0.0.1:{port}"

    def wait(self, server: LoggedProcess, refresh: Callable[[], None]) -> None:
        """Waits until the server and every daemon have ended, and calls `refresh` every POLL_SECONDS.

        Raises RunError with the last line of its log if a process ends with an error.
        """
        daemons = [each for each in self._started if each not in (server, self._broker)]
        while server.process.poll() is None or any(each.process.poll() is None for each in daemons):
            refresh()
            for each in self._started:
                _check(each, server)
            time.sleep(POLL_SECONDS)
        for each in (server, *daemons):
            _check(each, server)
        refresh()


def free_port() -> int:
    """A TCP port of this machine that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for_port(port: int, process: subprocess.Popen[Any], seconds: float) -> bool:
    """Waits until the process accepts connections on the port. False if it ends or takes longer than `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.05)
    return False


def last_line(log: Path) -> str:
    """The last line of a log file that is not blank."""
    lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _check(each: LoggedProcess, server: LoggedProcess) -> None:
    code = each.process.poll()
    if code is None or code == 0:
        return
    if code < 0 and (each is server or server.process.poll() is None):
        each.start()
        return
    raise RunError(f"{each.name} ended with exit code {code}: {each.last_line()} (log: {each.log})")
