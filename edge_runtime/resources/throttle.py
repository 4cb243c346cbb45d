"""What stands between two steps: now and then a look at the sensors, and a pause for as long as they forbid training.

A pause is only waiting, in the middle of whatever is being computed: what comes out is bit for bit the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from edge_runtime.engines.base import Batch, Engine
from edge_runtime.resources.governor import Limits, Readings, forbids
from edge_runtime.resources.level_cap import LevelCap, observe
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.protocol.messages import Training

LOOK_SECONDS = 2.0  # from one look at the sensors to the next


class Host(Protocol):
    """Whoever is at work: told how far it is, and what goes on in a pause."""

    def progress(self, activity: str, done: int, total: int) -> None: ...

    def pause(self, reason: str) -> None:
        """Called again and again in a pause, each time for a second or so, and once with "" when it is over. Raises to
        abandon what is being computed."""


class Pace:
    """A Report that pauses, and keeps the level cap."""

    def __init__(self, limits: Limits, read: Callable[[], Readings], cap: LevelCap, host: Host) -> None:
        """`read` looks at the sensors."""
        self.reason = ""  # why training is forbidden, by the last look
        self.readings = Readings()  # the newest
        self.cap = cap
        self.host = host
        self._limits = limits
        self._read = read
        self._due = 0.0

    def __call__(self, activity: str, done: int, total: int) -> None:
        self.host.progress(activity, done, total)
        self.keep()

    def keep(self) -> None:
        """Pauses if it is time to look, and training forbidden. To be called often: mostly it only reads the clock."""
        pausing = bool(self.reason)
        if not pausing and time.monotonic() < self._due:
            return
        while self.look():
            pausing = True
            self.host.pause(self.reason)
        if pausing:
            self.host.pause("")

    def look(self) -> str:
        """Why training is forbidden just now; "" if it is not."""
        self._due = time.monotonic() + LOOK_SECONDS
        self.readings = self._read()
        self.reason = forbids(self._limits, self.readings, datetime.now(), paused=bool(self.reason))
        return self.reason

    def stepped(self, level: int, seconds: float, samples: int) -> None:
        """What a training step took."""
        self.cap = observe(self.cap, level, seconds, samples)


class PacedEngine:
    """An engine that is timed for the level cap, and after whose every call there may be a pause.

    Of each training the first step is left out: it opens the graph, and the memory it takes is new to the process.
    """

    def __init__(self, engine: Engine, pace: Pace) -> None:
        self.name = engine.name
        self._engine = engine
        self._pace = pace
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
            self._pace.stepped(self._level, time.perf_counter() - started, len(batch.labels))
        self._warm = True
        self._pace.keep()
        return loss

    def predict(self, hidden: Floats) -> Floats:
        self._warm = False
        logits = self._engine.predict(hidden)
        self._pace.keep()
        return logits

    def release(self) -> None:
        self._warm = False
        self._engine.release()
