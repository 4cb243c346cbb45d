"""A process that a server starts beside itself: it reads its job, one line of JSON, from standard input, writes
LISTENING when it serves, and ends when standard input is closed. If it ends before, it is started again."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading

from fedfmsl.errors import RunError

logger = logging.getLogger(__name__)

LISTENING = "listening"  # the first line if it does
RESTART_SECONDS = 5.0


class ChildProcess:
    """Runs until `close`. What it writes after its first line is logged."""

    def __init__(self, module: str, job: str, what: str, restart_seconds: float = RESTART_SECONDS) -> None:
        """`python -m module`. `what` it is, for the log. Raises RunError with the process's reason if it does not
        serve."""
        self._command = (sys.executable, "-m", module)
        self._job, self._what = job, what
        self._restart_seconds = restart_seconds
        self._closing = threading.Event()
        self._process = self._start()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the process that serves now."""
        return self._process.pid

    def close(self) -> None:
        self._closing.set()
        _close_input(self._process)
        self._thread.join()

    def _start(self) -> subprocess.Popen[str]:
        """Raises RunError if it does not listen."""
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal ends the server, and the server ends this process
        )
        assert process.stdin and process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self._job + "\n")
            process.stdin.flush()
        first = process.stdout.readline().strip()
        if first != LISTENING:
            _close_input(process)
            process.wait()
            raise RunError(first or f"{self._what} does not start; its error is above")
        return process

    def _follow(self) -> None:
        """Logs what the process writes, until `close`."""
        while True:
            assert self._process.stdout
            for line in self._process.stdout:
                logger.warning("%s", line.strip())
            code = self._process.wait()
            if self._closing.is_set():
                return
            logger.warning("%s ended with exit code %d; starting it again", self._what, code)
            last = ""
            while not self._closing.wait(self._restart_seconds):
                try:
                    self._process = self._start()
                    break
                except (RunError, OSError) as error:  # OSError: no descriptor or no memory for another process
                    if str(error) != last:
                        logger.warning("%s does not start: %s", self._what, error)
                    last = str(error)
            else:
                return
            if self._closing.is_set():
                _close_input(self._process)


def _close_input(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        assert process.stdin
        process.stdin.close()
