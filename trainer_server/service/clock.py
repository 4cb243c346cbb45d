"""The run's clock."""

from __future__ import annotations

import time


class RunClock:
    """The working time of the run's servers in seconds; continues from `start`, where the previous one ended."""

    def __init__(self, start: float) -> None:
        self._offset = start - time.monotonic()

    def now(self) -> float:
        return self._offset + time.monotonic()
