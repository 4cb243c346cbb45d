"""The jobs of the worker thread: scans, rounds and the personalized model, from their start to their result.

All methods of `Jobs` run in the loop's thread; only the jobs themselves run in the worker thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from edge_runtime.daemon.disk_retry import DiskRetry
from edge_runtime.daemon.globals import GlobalsReceiver
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.round_runner import NoSamplesError, RoundRunner
from edge_runtime.daemon.state import Event, WorkDone, WorkFailed, WorkSkipped
from edge_runtime.daemon.timing import Timing
from edge_runtime.daemon.worker import Worker
from edge_runtime.data.samples import SampleChangedError
from edge_runtime.resources.throttle import WorkStoppedError
from edge_runtime.store.secure_store import NoKeysError
from edge_runtime.training.stored_model import is_exported
from fedfmsl.common.logs import fields
from fedfmsl.errors import ClockError, RunError
from fedfmsl.protocol.messages import Round, Stage

logger = logging.getLogger(__name__)

CLOCK_SECONDS = 60.0  # until a round is computed again that failed because of this machine's clock


class Jobs:
    def __init__(
        self,
        runner: RoundRunner,
        worker: Worker,
        received: GlobalsReceiver,
        disk: DiskRetry,
        health: HealthReporter,
        timing: Timing,
        handle: Callable[[Event], None],
        announce: Callable[[], None],
        required: Callable[[], set[str]],
    ) -> None:
        """`handle` advances the state machine. `announce` publishes the device's status. `required` returns the SHA-256
        of the global blobs that the announced and the running round need."""
        self._runner = runner
        self._worker = worker
        self._received = received
        self._disk = disk
        self._health = health
        self._timing = timing
        self._handle = handle
        self._announce = announce
        self._required = required
        self.no_samples = ""  # why there is nothing to train on
        self._next_scan = self._round_due = 0.0

    @property
    def may_start_round(self) -> bool:
        """False for a while after a failure."""
        return time.monotonic() >= self._round_due and not self._disk.waiting

    def scan_if_due(self) -> None:
        """To be called while the worker is idle."""
        now = time.monotonic()
        if now >= self._next_scan:
            self._worker.submit(self._runner.scan, partial(self._scan_ended, started=now))

    def start_round(self, round_: Round) -> None:
        """Scans the sample folder, then computes the round. Ends with WorkDone or WorkFailed."""
        self._worker.submit(self._runner.scan, partial(self._scan_for_round_ended, round_, started=time.monotonic()))

    def write_missing_model(self, then: Callable[[], None]) -> None:
        """Writes personalized.onnx if it is of another session or round than the personalized model, as after a missed
        evaluation."""
        if not is_exported(self._runner.device.store):
            self._worker.submit(self._runner.write_personalized, partial(self._model_ended, then))
        else:
            then()

    def disk_failed(self, error: OSError) -> None:
        self._disk.failed(error, self._required(), evict=self._worker.idle)

    def _scan_ended(self, future: Future[bool], started: float) -> bool:
        """Whether there are samples to train on."""
        now = time.monotonic()
        self._next_scan = now + max(self._timing.scan, (now - started) / self._timing.scan_share)
        try:
            changed = future.result()
        except NoSamplesError as error:
            if str(error) != self.no_samples:
                self.no_samples = str(error)
                logger.warning(f"{error}; waiting for samples")
                self._announce()
            return False
        except WorkStoppedError:
            return False
        except OSError as error:
            self.disk_failed(error)
            return False
        if changed or self.no_samples:
            self.no_samples = ""
            self._announce()
        return True

    def _scan_for_round_ended(self, round_: Round, future: Future[bool], started: float) -> None:
        if not self._scan_ended(future, started):
            self._round_due = time.monotonic() + self._timing.tick
            self._handle(WorkFailed(round_.round))
            return
        try:
            self._runner.device.store.globals.keep_only(self._required())
        except OSError as error:
            self.disk_failed(error)
            self._handle(WorkFailed(round_.round))
            return
        bytes_down = self._received.bytes_down
        self._worker.submit(
            partial(self._runner.run, round_, bytes_down), partial(self._round_ended, round_, bytes_down=bytes_down)
        )

    def _round_ended(self, round_: Round, future: Future[float], bytes_down: int) -> None:
        try:
            seconds = future.result()
        except WorkStoppedError:
            logger.info(f"round {round_.round} is stopped: a newer one is announced", **fields(round=round_.round))
        except SampleChangedError as error:
            logger.info(f"round {round_.round} starts again: {error}", **fields(round=round_.round))
        except OSError as error:
            self.disk_failed(error)
        except ClockError as error:
            logger.warning(f"round {round_.round} is computed again after {CLOCK_SECONDS:.0f} s: {error}")
            self._round_due = time.monotonic() + CLOCK_SECONDS
        except NoKeysError as error:
            logger.warning(str(error), **fields(round=round_.round))
            self._handle(WorkSkipped(round_.round))
            return
        else:
            self._disk.succeeded()
            self._received.bytes_down -= bytes_down
            self._health.rounds_done += 1
            what = "stage 2 alone" if round_.stage is Stage.FINISHED else round_.stage.value
            logger.info(
                f"round {round_.round}: {what} done in {seconds:.1f} s",
                **fields(
                    round=round_.round, stage=round_.stage.value, sal_level=round_.level, seconds=round(seconds, 3)
                ),
            )
            self._handle(WorkDone(round_.round))
            return
        self._handle(WorkFailed(round_.round))

    def _model_ended(self, then: Callable[[], None], future: Future[None]) -> None:
        try:
            future.result()
        except (OSError, RunError) as error:
            path = self._runner.device.store.personalized
            logger.warning(
                f"{path} could not be written ({error}); run python -m edge_runtime personalize to try again"
            )
        then()
