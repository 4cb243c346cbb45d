"""The computation of a round, from the scan of the sample folder to the update in the outbox.

All of it runs in the worker thread. Nothing here uses the network.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.daemon.privacy_budget import PrivacyBudget
from edge_runtime.data.features import Report
from edge_runtime.data.folder import SampleFolder
from edge_runtime.data.ledger import open_ledger
from edge_runtime.data.proposals import NothingToTrainError, describe_proposed
from edge_runtime.data.rehearsal import with_rehearsal
from edge_runtime.data.samples import Sample, SampleChangedError
from edge_runtime.engines.memory import peak_rss_mb
from edge_runtime.engines.sessions import CPU
from edge_runtime.resources.throttle import LevelCapTracker, StepControl, WorkStoppedError
from edge_runtime.resources.unfinished import UnfinishedWork
from edge_runtime.settings import Secure
from edge_runtime.training.alone import personalize_alone
from edge_runtime.training.context import DeviceContext
from edge_runtime.training.evaluation import evaluate, train_baseline
from edge_runtime.training.local_expert import level_before, train_personal
from edge_runtime.training.model import save_personal_model
from edge_runtime.training.personal_model import PersonalModel
from edge_runtime.training.stages import (
    Globals,
    StageFunction,
    StageResult,
    head_statistics,
    holders,
    measure_global,
    read_globals,
    statistics,
    train_global,
)
from edge_runtime.training.updates import prepare_update, update_header
from fedfmsl.common.files import write_atomically
from fedfmsl.common.folder_walk import SkippedFile, summarize
from fedfmsl.common.logs import UNENCODABLE, fields
from fedfmsl.errors import InputError, RunError, shown
from fedfmsl.protocol.messages import EXCHANGE, Round, Stage
from fedfmsl.protocol.tensors import pack

if TYPE_CHECKING:
    from edge_runtime.daemon.secure_rounds import SecureRounds

logger = logging.getLogger(__name__)

LOGGED_FILES = 10  # skipped files that one scan logs
POLL_SECONDS = 0.5
REQUIRED = {  # the stages that a device takes part in with secure aggregation only
    Secure.OFF: (),
    Secure.SUMS: (Stage.STATISTICS, Stage.HEAD),
    Secure.ALL: (Stage.STATISTICS, Stage.HEAD, Stage.GLOBAL, Stage.PERSONAL),
}
TRAINED = (Stage.GLOBAL, Stage.PERSONAL)  # stages after which the train samples are no longer new
MEASURES = (Stage.CANARY, Stage.BASELINE, Stage.EVALUATE)  # stages whose updates are accuracies and counts
STAGES: dict[Stage, StageFunction] = {
    Stage.HOLDERS: holders,
    Stage.STATISTICS: statistics,
    Stage.GLOBAL: train_global,
    Stage.HEAD: head_statistics,
    Stage.CANARY: measure_global,
    Stage.PERSONAL: train_personal,
    Stage.BASELINE: train_baseline,
    Stage.EVALUATE: evaluate,
}


class NoSamplesError(Exception):
    """The sample folder has nothing to train on now."""


def log_proposed(proposed: Mapping[str, int]) -> None:
    if proposed:
        about = "the operator adds them on the server with python -m trainer_server classes"
        logger.info(f"proposes new classes: {describe_proposed(proposed)}; {about}")


class RoundRunner:
    """Computes rounds with the device's samples and level cap as of the last scan."""

    def __init__(
        self,
        device: DeviceContext,
        folder: SampleFolder,
        control: StepControl,
        tracker: LevelCapTracker,
        scan_report: Report,
        identity: Path | None = None,
        secure: Secure = Secure.OFF,
        max_epsilon: float | None = None,
        rehearse: int = 0,
        provider: str = CPU,
    ) -> None:
        """`scan_report` receives the progress of scans. `identity`: the file whose key signs keys of secure sums.
        `secure`: what leaves the device with secure aggregation only. `max_epsilon`: its privacy budget. `rehearse`:
        how many deleted samples of each class training goes on with (`edge_runtime.data.rehearsal`). `provider`: that
        of the engine and the features, which is counted while a round is computed.
        """
        self.device = device
        self.control = control
        self.tracker = tracker
        self.budget = PrivacyBudget(device.store.budget, max_epsilon)
        self._folder = folder
        self._scan_report = scan_report
        self._identity = identity
        self._required = secure
        self._rehearse = rehearse
        self._provider = provider
        self._skipped: frozenset[SkippedFile] = frozenset()
        self._list_skipped()
        log_proposed(device.scanned.proposed)

    def scan(self) -> bool:
        """Updates `device` with the samples in the folder and the current level cap. Returns whether anything changed.

        Raises NoSamplesError if there is nothing to train on, OSError if the ledger cannot be written.
        """
        before, cap = self.device, self.tracker.cap.level
        try:
            scanned = self._folder.scan(report=self._scan_report)
        except NothingToTrainError as error:
            self._use(replace(before, scanned=replace(before.scanned, proposed=error.proposed)))
            raise NoSamplesError(str(error)) from error
        except InputError as error:
            raise NoSamplesError(str(error)) from error
        if scanned == before.scanned and cap == before.level_cap:
            return False
        if cap != before.level_cap:
            slowdown = f"{self.tracker.cap.slowdown:.1f} times as long as measured"
            logger.info(
                f"level cap {cap} instead of {before.level_cap}: steps take {slowdown}", **fields(level_cap=cap)
            )
        self._use(replace(before, scanned=scanned, level_cap=cap))
        self._list_skipped()
        return True

    def _use(self, device: DeviceContext) -> None:
        """Logs when other classes are proposed than before."""
        before, self.device = self.device, device
        if device.scanned.proposed != before.scanned.proposed:
            log_proposed(device.scanned.proposed)

    def _list_skipped(self) -> None:
        """Writes all skipped files to STATE/skipped.txt, by reason and one by one, and logs the new ones."""
        skipped = self.device.scanned.skipped
        new = [each for each in skipped if each not in self._skipped]
        if not new and len(skipped) == len(self._skipped):
            return
        if len(new) <= LOGGED_FILES:
            for each in new:
                logger.warning(f"skipped: {each}", **fields(file=shown(each.path), reason=each.reason))
        else:
            for line in summarize(new, self._folder.path)[:LOGGED_FILES]:
                logger.warning(f"skipped: {line}")
            logger.warning(f"{self.device.store.skipped} lists all {len(skipped)} skipped files")
        self._skipped = frozenset(skipped)
        lines = [*summarize(skipped, self._folder.path), "", *map(str, skipped)]
        with contextlib.suppress(OSError):  # the list is only for people
            write_atomically(
                self.device.store.skipped, "".join(f"{line}\n" for line in lines).encode("utf-8", UNENCODABLE)
            )

    def run(self, round_: Round, bytes_down: int) -> float:
        """Computes a round, to be called after a scan. Returns the seconds that it took. FINISHED: personalizes this
        device alone.

        Writes the update to the outbox, and the personalized model as of this round. Raises SampleChangedError if a
        file has changed since the scan, OSError if the disk is full, WorkStoppedError if the loop stops it. After an
        error the round can be computed again, with the same result. Raises RunError if it refuses secure sums, or if
        the round would pass its privacy budget.
        """
        with UnfinishedWork(self.device.store.root).counted(self._provider):
            return self._run(round_, bytes_down)

    def _run(self, round_: Round, bytes_down: int) -> float:
        if round_.stage is Stage.FINISHED:
            return self._personalize_alone(round_)
        if round_.stage in REQUIRED[self._required] and not round_.secure:
            raise RunError(
                f"--secure {self._required.value}: the server asks for round {round_.round} ({round_.stage.value}) "
                "without secure aggregation; start the run with --secure-sums or --secure"
            )
        store = self.device.store
        self._enter(round_)
        self.control.check()
        started, device = time.perf_counter(), self.device
        if round_.stage in EXCHANGE:
            return self._write_update(round_, self._secure.exchange(round_, device.level_cap), started, bytes_down)
        if round_.secure:  # the level cap may have changed since
            device = replace(device, level_cap=self._secure.level(round_))
        global_values = read_globals(device.bundle, store.globals.read, round_)
        present, device = device, self._with_rehearsal(device, round_, global_values)
        try:  # the baseline trains at levels of which deleted samples may have no states
            result = STAGES[round_.stage](present if round_.stage is Stage.BASELINE else device, round_, global_values)
        except SampleChangedError as error:
            self._folder.forget(error.path)
            raise
        model = result.model
        # The noise is from the operating system's entropy: a server that knew its seed could subtract it.
        result = prepare_update(device.bundle, store.residual, round_, result, np.random.default_rng())
        if self.budget.limit is not None and round_.stage in MEASURES:
            # Accuracies and counts without noise reveal facts about the samples, as often as the server asks for them.
            result = StageResult(level=round_.level)
        if round_.secure:
            result = self._secure.mask(round_, result)
        if round_.stage is Stage.CANARY:  # predictions do not use a global expert that may be rejected
            return self._write_update(round_, result, started, bytes_down)
        self._save_model(device, round_, global_values, model)
        if round_.stage is Stage.EVALUATE:
            self.write_personalized()
        seconds = self._write_update(round_, result, started, bytes_down)
        if round_.stage in TRAINED:
            self._mark_trained(device, round_)
        return seconds

    def _with_rehearsal(self, device: DeviceContext, round_: Round, published: Globals) -> DeviceContext:
        """The device with deleted samples to train with."""
        if not self._rehearse:
            return device
        levels = {device.level_of(published.expert) if published.expert.size else round_.level}
        if round_.stage is Stage.PERSONAL:
            levels.add(max(*levels, level_before(device, round_)))
        with open_ledger(device.store.samples) as ledger:
            kept = ledger.kept_for_rehearsal()

        def is_stored(sample: Sample) -> bool:
            return all(device.cache.has(sample, level) for level in levels)

        scanned = with_rehearsal(
            device.scanned, kept, device.bundle.classes, self._rehearse, self._folder.path, is_stored
        )
        return replace(device, scanned=scanned)

    def _personalize_alone(self, finished: Round) -> float:
        """Personalizes this device from a finished run in which it took no part. It enters the run's session last, so
        that a device that ends before goes on with this when it is started again."""
        self.control.check()
        started, device = time.perf_counter(), self.device
        published = read_globals(device.bundle, device.store.globals.read, finished)
        trained = self._with_rehearsal(device, finished, published)

        def training(round_: Round) -> DeviceContext:
            nonlocal trained
            trained = self._with_rehearsal(device, round_, published)
            return trained

        try:
            model = personalize_alone(device, finished, published, training).model
        except SampleChangedError as error:
            self._folder.forget(error.path)
            raise
        self._save_model(trained, finished, published, model)
        self.write_personalized()
        self._mark_trained(trained, finished)
        self._enter(finished)
        return time.perf_counter() - started

    def _enter(self, round_: Round) -> None:
        """Enters the session of a round."""
        store = self.device.store
        if round_.session != store.outbox.session:  # a server that comes back to a session could ask for a round again
            store.secure.forget()
            self.budget.forget_round()
        store.outbox.enter(round_.session, round_.run)

    def _save_model(
        self, device: DeviceContext, round_: Round, published: Globals, model: PersonalModel | None
    ) -> None:
        kept = save_personal_model(device, round_, published, model)
        if kept:
            logger.warning(kept, **fields(round=round_.round))
        device.cache.drop_unused()
        device.cache.drop_others(device.scanned.samples)

    def _mark_trained(self, device: DeviceContext, round_: Round) -> None:
        with contextlib.suppress(OSError), open_ledger(device.store.samples) as ledger:  # a full disk: still new
            names = {sample.sha256: device.bundle.classes[sample.label] for sample in device.splits.train}
            ledger.mark_trained(names, round_.run)
            ledger.keep_for_rehearsal(names if self._rehearse else {})

    def _write_update(self, round_: Round, result: StageResult, started: float, bytes_down: int) -> float:
        """Writes the update to the outbox. Returns the seconds since `started`."""
        seconds = time.perf_counter() - started
        self.budget.record(round_)
        update = update_header(
            self.device, round_, result, seconds=seconds, peak_rss_mb=peak_rss_mb(), bytes_down=bytes_down
        )
        self.device.store.outbox.write(round_.round, pack(update, result.tensors))
        return seconds

    @cached_property
    def _secure(self) -> SecureRounds:
        from edge_runtime.daemon.secure_rounds import SecureRounds  # takes 8 MB of memory

        return SecureRounds(self.device.store, self.device.device_name, self._identity)

    def write_personalized(self) -> None:
        """Writes personalized.onnx in a separate process, because the onnx package takes memory.

        Raises RunError if that process fails, OSError if the disk is full, WorkStoppedError if the loop stops it.
        """
        device = self.device
        command = [sys.executable, "-m", "edge_runtime", "personalize"]
        command += ["--bundle", str(device.bundle.root), "--state", str(device.store.root)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        ) as process:
            stderr = self._wait_for(process)
        if process.returncode == os.EX_IOERR:
            raise OSError(errno.ENOSPC, "no space for the personalized model")
        if process.returncode:
            raise RunError(f"the personalized model could not be written: {stderr.strip()}")

    def _wait_for(self, process: subprocess.Popen[str]) -> str:
        """Waits for the end of the process and returns its stderr. Raises WorkStoppedError if the loop stops it."""
        while True:
            try:
                return process.communicate(timeout=POLL_SECONDS)[1]
            except subprocess.TimeoutExpired:
                if self.control.stopped:
                    process.kill()
                    raise WorkStoppedError from None
