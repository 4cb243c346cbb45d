"""A round's work, from what lies in the folder to the update in the outbox. Nothing here talks to anybody."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edge_runtime.daemon import wanted
from edge_runtime.device import Device
from edge_runtime.evaluation import evaluate, train_alone
from edge_runtime.folder import SampleFolder
from edge_runtime.memory import peak_rss_mb
from edge_runtime.model import keep_personal_model
from edge_runtime.pace import Pace
from edge_runtime.personal import train_personal
from edge_runtime.stages import Globals, statistics, train_global
from edge_runtime.stages import Work as StageWork
from edge_runtime.updates import header_of, prepare
from protocol.errors import RunError
from protocol.layout import Vector
from protocol.messages import Globals as GlobalsHeader
from protocol.messages import Round, Stage
from protocol.tensors import Tensors, pack, unpack

STAGES: dict[Stage, StageWork] = {
    Stage.STATISTICS: statistics,
    Stage.GLOBAL: train_global,
    Stage.PERSONAL: train_personal,
    Stage.BASELINE: train_alone,
    Stage.EVALUATE: evaluate,
}


class Worker:
    """Does rounds with a device as it is at the time: its samples come and go, and it may become slow."""

    def __init__(self, device: Device, folder: SampleFolder, pace: Pace) -> None:
        self.device = device
        self.pace = pace
        self._folder = folder

    def look(self) -> bool:
        """Looks at the folder and at the level cap. Returns whether that has changed what others know of this device.

        Raises InputError if there is nothing to train on.
        """
        before = self.device
        scanned, cap = self._folder.look(), self.pace.cap.level
        if scanned == before.scanned and cap == before.level_cap:
            return False
        self.device = replace(before, scanned=scanned, level_cap=cap)
        return True

    def work(self, task: Round, bytes_down: int) -> float:
        """Leaves the update in the outbox, and the personalized model as of this round. Returns the seconds it took.

        Raises OSError if the disk does not take what has to be kept; what was changed until then does no harm to
        another attempt.
        """
        started, device = time.perf_counter(), self.device
        store = device.store
        store.drop_globals(keep=wanted(task))
        given = self._globals(task)
        outcome = STAGES[task.stage](device, task, given)
        # noise from the operating system's entropy: a server that knew the seed could subtract it
        outcome = prepare(device.bundle, store.residual, task, outcome, np.random.default_rng())
        keep_personal_model(device, task, given)
        device.cache.drop_unused()
        if task.stage is Stage.EVALUATE:
            write_personalized(device)
        seconds = time.perf_counter() - started
        update = header_of(device, task, outcome, seconds=seconds, peak_rss_mb=peak_rss_mb(), bytes_down=bytes_down)
        store.put_outbox(task.round, pack(update, outcome.tensors))
        return seconds

    def _globals(self, task: Round) -> Globals:
        layout = self.device.bundle.expert
        expert, start = (self._vector(sha256, layout.join) for sha256 in (task.expert, task.start))
        return Globals(expert, start, self._vector(task.gate, self.device.bundle.gate.join))

    def _vector(self, sha256: str, join: Callable[[Tensors], Vector]) -> Vector:
        if not sha256:
            return np.empty(0, np.float32)
        blob = self.device.store.global_blob(sha256)
        if blob is None:
            raise RunError(
                f"the global blob {sha256[:12]}… has gone or changed on the disk; start again to fetch it anew"
            )
        _, tensors = unpack(blob, GlobalsHeader)
        return join(tensors)


def write_personalized(device: Device) -> None:
    """In a process of its own: it needs the onnx package, which the daemon has no memory to spare for.

    Raises RunError if that process fails, OSError if there was no room for what it wrote.
    """
    command = [sys.executable, "-m", "edge_runtime", "personalize"]
    command += ["--bundle", str(device.bundle.root), "--state", str(device.store.root)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == os.EX_IOERR:
        raise OSError(errno.ENOSPC, "no room for the personalized model")
    if result.returncode:
        raise RunError(f"the personalized model could not be written: {result.stderr.strip()}")
