"""A round's work, from what lies in the folder to the update in the outbox. Nothing here talks to anybody."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edge_runtime.daemon.state import required_globals
from edge_runtime.data.folder import SampleFolder
from edge_runtime.data.samples import SampleChangedError
from edge_runtime.engines.memory import peak_rss_mb
from edge_runtime.resources.throttle import Pace
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.evaluation import evaluate, train_baseline
from edge_runtime.training.local_expert import train_personal
from edge_runtime.training.model import save_personal_model
from edge_runtime.training.stages import Globals, StageFunction, statistics, train_global
from edge_runtime.training.updates import prepare_update, update_header
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.common.class_folders import SkippedFile
from fedfmsl.common.files import write_atomically
from fedfmsl.common.logs import fields
from fedfmsl.errors import RunError
from fedfmsl.protocol.messages import Globals as GlobalsHeader
from fedfmsl.protocol.messages import Round, Stage
from fedfmsl.protocol.tensors import Tensors, pack, unpack

logger = logging.getLogger(__name__)

SHOWN = 10  # of the files that are set aside at once, in the log
STAGES: dict[Stage, StageFunction] = {
    Stage.STATISTICS: statistics,
    Stage.GLOBAL: train_global,
    Stage.PERSONAL: train_personal,
    Stage.BASELINE: train_baseline,
    Stage.EVALUATE: evaluate,
}


class Worker:
    """Does rounds with a device as it is at the time: its samples come and go, and it may become slow."""

    def __init__(self, device: TrainingContext, folder: SampleFolder, pace: Pace) -> None:
        self.device = device
        self.pace = pace
        self._folder = folder
        self._listed: frozenset[SkippedFile] = frozenset()
        self._list_skipped()

    def look(self) -> bool:
        """Looks at the folder and at the level cap. Returns whether that has changed what others know of this device.

        Raises InputError if there is nothing to train on.
        """
        before = self.device
        scanned, cap = self._folder.scan(), self.pace.cap.level
        if scanned == before.scanned and cap == before.level_cap:
            return False
        if cap != before.level_cap:
            slower = f"{self.pace.cap.slowdown:.1f} times as long as measured"
            logger.info(f"level cap {cap} instead of {before.level_cap}: steps take {slower}", **fields(level_cap=cap))
        self.device = replace(before, scanned=scanned, level_cap=cap)
        self._list_skipped()
        return True

    def _list_skipped(self) -> None:
        """On the disk all files that are not used, in the log those that have not been there yet."""
        now = self.device.scanned.skipped
        new = [one for one in now if one not in self._listed]
        if not new and len(now) == len(self._listed):
            return
        for one in new[:SHOWN]:
            logger.warning(f"set aside: {one}", **fields(file=str(one.path), reason=one.reason))
        if len(new) > SHOWN:
            logger.warning(f"set aside: {len(new) - SHOWN} more; all are in {self.device.store.skipped}")
        self._listed = frozenset(now)
        with contextlib.suppress(OSError):  # it is only for people
            write_atomically(self.device.store.skipped, "".join(f"{one}\n" for one in now).encode())

    def work(self, task: Round, bytes_down: int) -> float:
        """Leaves the update in the outbox, and the personalized model as of this round. Returns the seconds it took.

        Raises SampleChangedError if a file is not any more what it was at the last look, which has to be repeated, and
        OSError if the disk does not take what has to be kept; what was changed until then does no harm to
        another attempt.
        """
        started, device = time.perf_counter(), self.device
        store = device.store
        store.drop_globals(keep=required_globals(task))
        given = self._globals(task)
        try:
            outcome = STAGES[task.stage](device, task, given)
        except SampleChangedError as error:
            self._folder.forget(error.path)
            raise
        # noise from the operating system's entropy: a server that knew the seed could subtract it
        outcome = prepare_update(device.bundle, store.residual, task, outcome, np.random.default_rng())
        save_personal_model(device, task, given)
        device.cache.drop_unused()
        device.cache.drop_others(device.scanned.samples)
        if task.stage is Stage.EVALUATE:
            write_personalized(device)
        seconds = time.perf_counter() - started
        update = update_header(device, task, outcome, seconds=seconds, peak_rss_mb=peak_rss_mb(), bytes_down=bytes_down)
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


def write_personalized(device: TrainingContext) -> None:
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
