"""The processes of a trial on one machine: broker, server, and daemons, watched until the run has finished."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from fedfmsl.errors import RunError

BROKER_SECONDS = 20
LOOK_SECONDS = 0.25
GRACE_SECONDS = 10


@dataclass
class Worker:
    """One process with its own log."""

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
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"


class Fleet:
    """Whichever process is killed is started again with the same command, as its service manager would do it. Leaving
    the fleet, by whatever way, leaves no process behind."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self.workers: list[Worker] = []
        self._broker: Worker | None = None

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for worker in reversed(self.workers):
            worker.process.terminate()
        for worker in self.workers:
            try:
                worker.process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def start(self, name: str, *arguments: str) -> Worker:
        worker = Worker(name, arguments, self._logs / f"{name}.log")
        self.workers.append(worker)
        return worker

    def start_broker(self) -> str:
        """An embedded broker on a free port; its address. Raises RunError if it does not come up."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        worker = self._broker = self.start("broker", "devices.trial.broker", "--port", str(port))
        end = time.monotonic() + BROKER_SECONDS
        while time.monotonic() < end and worker.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"mqtt://127.0.0.1:{port}"
            time.sleep(0.05)
        raise RunError(f"the embedded broker did not come up: {worker.last_line()}")

    def wait(self, until: Worker, look: Callable[[], None]) -> None:
        """Until that worker, and then every daemon, has ended; `look` is called now and then.

        Raises RunError, with what it printed last, if any process ends with an error.
        """
        daemons = [worker for worker in self.workers if worker not in (until, self._broker)]
        while until.process.poll() is None or any(worker.process.poll() is None for worker in daemons):
            look()
            for worker in self.workers:
                self._check(worker, until)
            time.sleep(LOOK_SECONDS)
        for worker in (until, *daemons):
            self._check(worker, until)
        look()

    @staticmethod
    def _check(worker: Worker, server: Worker) -> None:
        code = worker.process.poll()
        if code is None or code == 0:
            return
        if code < 0 and (worker is server or server.process.poll() is None):
            worker.start()
            return
        raise RunError(f"{worker.name} ended early: {worker.last_line()} (its log: {worker.log})")
