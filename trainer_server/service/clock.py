"""The run's clock."""

from __future__ import annotations

import time


class RunClock:
    """Seconds during which a server of the run worked. Continues from `start`, the last time of the previous server."""

    def __init__(self, start: float) -> None:
        self._offset = start - time.monotonic()

    def now(self) -> float:
        return self._offset + time.monotonic()
