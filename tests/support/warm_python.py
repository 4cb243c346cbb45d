"""python tests/support/warm_python.py MODULE…: imports these modules, then forks itself for each command.

A command that takes a second, most of it for imports, then takes a tenth. It still has a process of its own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from types import TracebackType
from typing import IO

SECONDS = 600  # until a command that hangs is ended


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str

    def assert_error(self, code: int, *parts: str) -> None:
        """The process ended with `code` and one error line on stderr that contains every part."""
        assert "Traceback" not in self.stdout + self.stderr
        assert len(self.stderr.splitlines()) == 1, self.stderr
        assert self.stderr.startswith("error: ")
        assert [part for part in parts if part not in self.stderr] == [], self.stderr
        assert self.code == code


class WarmPython:
    def __init__(self, *imports: str, environment: Mapping[str, str] | None = None) -> None:
        """`imports`: modules that commands need. `environment`: added to that of this process at each command."""
        self._lock, self._environment = Lock(), {"COLUMNS": "1000", **(environment or {})}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self._environment},
        )

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._process.communicate()

    def run(self, module: str, *arguments: str, cwd: Path | None = None) -> Ended:
        """`python -m module arguments` to its end. A command of more than SECONDS is ended by SIGALRM."""
        assert self._process.stdin and self._process.stdout
        request = [{**os.environ, **self._environment}, str(cwd or Path.cwd()), module, *arguments]
        with self._lock:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return Ended(*json.loads(self._process.stdout.readline()))


def _serve() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # the forks need not look at these objects
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        environment, folder, module, *arguments = json.loads(line)
        with TemporaryFile() as out, TemporaryFile() as errors:
            child = os.fork()
            if child == 0:
                _become(environment, folder, out, errors)
                sys.argv[1:] = arguments
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                return
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [_text(each) for each in (out, errors)]
        print(json.dumps([code, *texts]), file=answers, flush=True)


def _become(environment: Mapping[str, str], folder: str, out: IO[bytes], errors: IO[bytes]) -> None:
    """A process with this environment, working directory and output."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder  # as with -m
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out.fileno(), 1), (errors.fileno(), 2)):
        os.dup2(source, target)
    signal.alarm(SECONDS)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())
    _serve()
