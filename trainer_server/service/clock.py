"""The run's clock."""

from __future__ import annotations

import time
from collections.abc import Callable


class RunClock:
    """Seconds during which a server of the run worked. Continues from `start`, the last time of the previous server.
    `wall` returns the unix seconds of the wall clock, which decides only when the run rests."""

    def __init__(self, start: float, wall: Callable[[], float] = time.time) -> None:
        self._offset = start - time.monotonic()
        self.wall = wall

    def now(self) -> float:
        return self._offset + time.monotonic()
