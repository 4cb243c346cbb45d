"""Runs `python -m edge_runtime predict --watch` for the daemon, in a separate process.

A file that crashes the classifier therefore does not end the daemon. The process has low priority, and classifies while
the daemon trains.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from fedfmsl.common.backoff import Backoff
from fedfmsl.protocol.messages import Prediction, first_error

logger = logging.getLogger(__name__)

NICENESS = 10
RESTART = Backoff(first=1.0, longest=300.0)
TERMINATE_SECONDS = 10.0  # from SIGTERM to SIGKILL


class Watcher:
    """A context manager: starts the process, restarts it with backoff when it ends, and terminates it on exit.

    `on_prediction` runs in the watcher's thread.
    """

    def __init__(
        self,
        folder: Path,
        state: Path,
        bundle: Path,
        on_prediction: Callable[[Prediction], None],
        restart: Backoff = RESTART,
    ) -> None:
        self._folder = folder
        self._restart = restart
        self._command = [sys.executable, "-m", "edge_runtime", "predict", "--json"]
        self._command += ["--watch", str(folder), "--state", str(state), "--bundle", str(bundle)]
        self._on_prediction = on_prediction
        self._stopping = threading.Event()
        self._start_lock = threading.Lock()  # after `_stopping` is set no process starts
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
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
                self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
                with contextlib.suppress(ProcessLookupError):  # the process has already ended
                    os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)  # its threads inherit it
            if self._read_predictions(self._process):
                restarts = 0
            code = self._process.wait()
            if self._stopping.is_set():
                return
            pause = self._restart.delay(restarts)
            restarts += 1
            logger.warning(f"the classifier of {self._folder} ended with exit code {code}; restarting in {pause:.0f} s")
            self._stopping.wait(pause)

    def _read_predictions(self, process: subprocess.Popen[bytes]) -> int:
        """Passes on predictions until the process closes its output. Returns their number."""
        assert process.stdout is not None
        count = 0
        with process.stdout as lines:
            for line in lines:
                try:
                    prediction = Prediction.model_validate_json(line)  # with every class; published are those that fit
                except ValidationError as error:
                    reason = first_error(error)
                    logger.warning(f"ignored an invalid line from the classifier of {self._folder}: {reason}")
                else:
                    self._on_prediction(prediction)
                    count += 1
        return count
