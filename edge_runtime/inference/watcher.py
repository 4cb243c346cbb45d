"""The watched folder's classifier, as the daemon runs it: in a process of its own, which may end at any time.

So nothing that a file makes of it ends the daemon, and it classifies while the daemon trains, with what the processor
has left.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from fedfmsl.common.backoff import Backoff
from fedfmsl.common.log import log
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import Prediction, parse

NICENESS = 10
RESTART = Backoff(first=1.0, longest=300.0)
END_SECONDS = 10.0  # that it gets to end in good order


class Watcher:
    """`seen` is called in a thread of the watcher's own. The process is started on entering, and again with growing
    pauses whenever it ends; leaving ends it."""

    def __init__(
        self,
        folder: Path,
        state: Path,
        bundle: Path,
        seen: Callable[[Prediction], None],
        restart: Backoff = RESTART,
    ) -> None:
        self._folder = folder
        self._restart = restart
        self._command = [sys.executable, "-m", "edge_runtime", "predict", "--json"]
        self._command += ["--watch", str(folder), "--state", str(state), "--bundle", str(bundle)]
        self._seen = seen
        self._leaving = threading.Event()
        self._guard = threading.Lock()  # no process is started once it leaves
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._guard:
            self._leaving.set()
            if self._process is not None:
                self._process.terminate()
        self._thread.join(END_SECONDS)
        if self._process is not None and self._thread.is_alive():
            self._process.kill()
            self._thread.join()

    def _run(self) -> None:
        restarts = 0
        while True:
            with self._guard:
                if self._leaving.is_set():
                    return
                self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)  # its threads will inherit it
            if self._follow(self._process):
                restarts = 0
            code = self._process.wait()
            if self._leaving.is_set():
                return
            pause = self._restart.delay(restarts)
            restarts += 1
            log.warning(f"what watches {self._folder} has ended ({code}); it is started again in {pause:.0f} s")
            self._leaving.wait(pause)

    def _follow(self, process: subprocess.Popen[bytes]) -> int:
        """Hands on what the process says until its end; returns how many predictions that were."""
        assert process.stdout is not None
        count = 0
        with process.stdout as lines:
            for line in lines:
                try:
                    prediction = parse(Prediction, line)
                except MessageError as error:
                    log.warning(f"dropped a line about {self._folder}: {error}")
                else:
                    self._seen(prediction)
                    count += 1
        return count
