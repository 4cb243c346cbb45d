"""How long a fleet takes to recover from a fault.

It starts when the fault strikes, so a fault that lasts is part of it. It ends when a round that was opened after the
fault is closed, or the run is over: then every device has received a round, and the server has its update. Without a
fault this takes a round and a half.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import TracebackType

from support.fault_records import Row
from support.processes import RUN_SECONDS, wait_until
from trainer_server.storage.run_store import DATABASE

RECOVERY_SECONDS = 240.0  # timeout
WITHIN_SECONDS = 0.6  # a fault strikes so long after the fleet has recovered from the one before


def strike_each(
    out: Path,
    row: Row,
    times: int,
    strike: Callable[[int], object],
    before: Callable[[int], object] = lambda number: None,
) -> None:
    """Strikes at `times` random moments, each after the fleet has recovered from the fault before. `before` waits until
    the fault happens that `strike` repairs. Both take the number of the fault. `out`: the server's folder."""
    recovery = Recovery(out, row)
    for number in range(times):
        recovery.wait_for_a_moment()
        before(number)
        with recovery:
            strike(number)


class Recovery:
    """A context that holds one fault, for one run after another. It reads the server's folder `out`."""

    def __init__(self, out: Path, row: Row, seed: int = 0) -> None:
        self._path = out / DATABASE
        self._seconds = row.seconds
        self._draw = random.Random(seed)
        self._closed, self._over = 0, False
        self._struck = 0.0

    def __enter__(self) -> None:
        self._struck = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self._read()
            open_now = self._closed + 1
            wait_until(lambda: self._has_closed(open_now + 1), f"round {open_now + 1} is closed", RECOVERY_SECONDS)
            self._seconds.append(time.monotonic() - self._struck)

    def wait_for_a_moment(self) -> None:
        """Returns at a random moment of a round of stage 1."""
        wait_until(lambda: self._has_closed(1), "stage 1", RUN_SECONDS)
        time.sleep(self._draw.uniform(0.0, WITHIN_SECONDS))
        self._read()
        assert not self._over, "the run is over before the last fault"

    def _has_closed(self, number: int) -> bool:
        self._read()
        return self._closed >= number or self._over

    def _read(self) -> None:
        """Keeps the last values while the database cannot be read."""
        try:
            with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=0.1)) as db:
                (self._closed,) = db.execute("SELECT coalesce(max(round), 0) FROM rounds").fetchone()
                (ended,) = db.execute("SELECT ended FROM run").fetchone()
                self._over = ended is not None
        except sqlite3.Error:
            return
