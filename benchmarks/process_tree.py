"""What a command and all processes that it starts use: processor seconds, wall-clock time, peak memory."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Lock, Thread

import psutil

from fedfmsl.errors import RunError

INTERVAL = 0.2  # seconds between two samples; a process loses at most so much at its end
MEMORY_EVERY = 5  # samples


@dataclass(frozen=True)
class Mark:
    """A line that the command has printed. `processor` and `wall`: seconds since the start. `training`: processor
    seconds that the devices' training has used so far, as the command counts them."""

    name: str
    training: float
    processor: float
    wall: float


@dataclass
class ProcessTree:
    """The processes of a command, from their start. `peak_mb`: the highest sum of their proportional memory, in which
    each shared page counts once."""

    root: psutil.Process
    peak_mb: float = 0.0
    _known: dict[psutil.Process, float] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def processor_seconds(self) -> float:
        with self._lock:
            for process in {self.root, *self._known, *self.children()}:
                with suppress(psutil.NoSuchProcess):  # its last value stays
                    times = process.cpu_times()
                    self._known[process] = times.user + times.system
            return sum(self._known.values())

    def add_memory(self) -> None:
        total = 0
        for process in [self.root, *self.children()]:
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        self.peak_mb = max(self.peak_mb, total / 2**20)

    def children(self) -> list[psutil.Process]:
        try:
            return self.root.children(recursive=True)
        except psutil.NoSuchProcess:
            return []


@dataclass(frozen=True)
class Usage:
    marks: list[Mark]
    processor: float
    wall: float
    peak_mb: float


def measure(command: Sequence[str], environment: Mapping[str, str]) -> Usage:
    """Runs a command that prints marks as JSON objects, {"name": …, "training": …}.

    Raises RunError if it fails.
    """
    started, marks = time.perf_counter(), []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        tree, done = ProcessTree(psutil.Process(process.pid)), Event()

        def sample() -> None:
            count = 0
            while not done.wait(INTERVAL):
                tree.processor_seconds()
                if count % MEMORY_EVERY == 0:
                    tree.add_memory()
                count += 1

        sampler = Thread(target=sample, daemon=True)  # does not outlive an interrupted command
        sampler.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"name"'):
                mark = json.loads(line)
                marks.append(Mark(**mark, processor=tree.processor_seconds(), wall=time.perf_counter() - started))
        process.wait()
        done.set()
        sampler.join()
    if process.returncode:
        raise RunError(f"{' '.join(command[:3])} … failed; see its output above")
    return Usage(marks, tree.processor_seconds(), time.perf_counter() - started, tree.peak_mb)
