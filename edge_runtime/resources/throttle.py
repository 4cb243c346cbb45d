"""Between two steps of a computation: pause, stop, and measure how long steps take.

The computation runs in the worker thread. The I/O loop controls it from its own thread through a `StepControl`. A pause
only delays the computation, so the result is bit-identical.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from edge_runtime.data.features import Report
from edge_runtime.engines.base import Batch, Engine
from edge_runtime.resources.level_cap import LevelCap, observe
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.protocol.messages import Training


class WorkStoppedError(Exception):
    """The I/O loop has stopped the computation. The round can be computed again."""


class StepControl:
    """Pauses and stops a computation in another thread, which calls `check` between two steps."""

    def __init__(self) -> None:
        self.steps = 0  # calls of `check` and `check_stopped`: they show that the computation goes on
        self._changed = threading.Condition()
        self._paused = False
        self._stopped = False

    def check(self) -> None:
        """Waits while the computation is paused. Raises WorkStoppedError once it is stopped."""
        self.steps += 1
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._paused)
        self._raise_if_stopped()

    def check_stopped(self) -> None:
        """Raises WorkStoppedError once the computation is stopped, and does not wait."""
        self.steps += 1
        self._raise_if_stopped()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def pause(self, paused: bool) -> None:
        """Starts or ends a pause."""
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    def stop(self, stopped: bool = True) -> None:
        """Makes the next check raise WorkStoppedError, also during a pause. `stop(False)` ends that."""
        with self._changed:
            self._stopped = stopped
            self._changed.notify_all()

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise WorkStoppedError


def reported_and_checked(report: Report, check: Callable[[], None]) -> Report:
    """A Report that calls `report`, then `check`."""

    def both(activity: str, done: int, total: int) -> None:
        report(activity, done, total)
        check()

    return both


class LevelCapTracker:
    """The level cap as of the last step."""

    def __init__(self, cap: LevelCap) -> None:
        self.cap = cap

    def record(self, level: int, seconds: float, samples: int) -> None:
        """Takes the duration of a training step into account."""
        self.cap = observe(self.cap, level, seconds, samples)


class ControlledEngine:
    """An engine that measures its steps for the level cap and checks its StepControl after every call.

    The first step of each training is not measured: it opens the graph and allocates memory.
    """

    def __init__(self, engine: Engine, control: StepControl, tracker: LevelCapTracker) -> None:
        self.name = engine.name
        self._engine = engine
        self._control = control
        self._tracker = tracker
        self._level = 0
        self._warm = False

    def load(self, level: int) -> None:
        self._level, self._warm = level, False
        self._engine.load(level)

    def set(self, theta: Vector, training: Training | None = None) -> None:
        self._warm = False
        self._engine.set(theta, training)

    def get(self) -> Vector:
        return self._engine.get()

    def step(self, batch: Batch) -> float:
        started = time.perf_counter()
        loss = self._engine.step(batch)
        if self._warm:
            self._tracker.record(self._level, time.perf_counter() - started, len(batch.labels))
        self._warm = True
        self._control.check()
        return loss

    def predict(self, hidden: Floats) -> Floats:
        self._warm = False
        logits = self._engine.predict(hidden)
        self._control.check()
        return logits

    def features(self, hidden: Floats) -> Floats:
        self._warm = False
        features = self._engine.features(hidden)
        self._control.check()
        return features

    def release(self) -> None:
        self._warm = False
        self._engine.release()
