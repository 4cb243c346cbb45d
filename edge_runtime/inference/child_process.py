"""A process of the daemon's own: it is restarted with backoff when it ends, and ends with the daemon."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO

from fedfmsl.common.backoff import Backoff

logger = logging.getLogger(__name__)

NICENESS = 10
RESTART = Backoff(first=1.0, longest=300.0)
TERMINATE_SECONDS = 10.0  # from SIGTERM to SIGKILL


class ChildProcess:
    """A context manager: starts `python -m edge_runtime`, with low priority, and terminates it on exit.

    A process that loses its standard output has to end: so it ends also if the daemon is killed.
    """

    def __init__(
        self,
        what: str,
        arguments: Sequence[str],
        on_line: Callable[[bytes], bool],
        restart: Backoff = RESTART,
    ) -> None:
        """`what` names it in the log. `on_line` is called in a thread with each line of its output, and returns whether
        it shows that the process works; the next restart then comes at once."""
        self._what = what
        self._restart = restart
        self._command = [sys.executable, "-m", "edge_runtime", *arguments]
        self._on_line = on_line
        self._stopping = threading.Event()
        self._start_lock = threading.Lock()  # after `_stopping` is set no process starts
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="child", daemon=True)

    def __enter__(self) -> ChildProcess:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._start_lock:
            self._stopping.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join(TERMINATE_SECONDS)
        if self._process is not None and self._thread.is_alive():
            self._process.kill()
            self._thread.join()

    @property
    def pid(self) -> int | None:
        """Process ID of the newest process, even if it has ended. None before the first start."""
        return self._process.pid if self._process else None

    def _run(self) -> None:
        restarts = 0
        while True:
            with self._start_lock:
                if self._stopping.is_set():
                    return
                started = time.monotonic()
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C in a terminal ends the daemon, and the daemon ends this process
                )
                with contextlib.suppress(ProcessLookupError):  # the process has already ended
                    os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)  # its threads inherit it
            assert self._process.stdout is not None
            if self._read(self._process.stdout) or time.monotonic() - started > self._restart.longest:
                restarts = 0
            code = self._process.wait()
            if self._stopping.is_set():
                return
            pause = self._restart.delay(restarts)
            restarts += 1
            logger.warning(f"{self._what} ended with exit code {code}; restarting in {pause:.0f} s")
            self._stopping.wait(pause)

    def _read(self, output: IO[bytes]) -> bool:
        """Passes on lines until the process closes its output. Returns whether it has worked."""
        has_worked = False
        with output as lines:
            for line in lines:
                has_worked |= self._on_line(line)
        return has_worked
