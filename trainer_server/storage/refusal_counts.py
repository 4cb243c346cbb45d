"""How often messages of devices were refused, in RUN/run.sqlite."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RefusalCount:
    """How often messages of one kind from one device were refused. `last`: the text of the latest refusal."""

    device: str
    kind: str
    count: int
    last: str


class RefusalCounts:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def add(self, refusals: Mapping[tuple[str, str], tuple[int, str]]) -> None:
        """Within a transaction of the caller. `refusals`: count and latest text by device and kind."""
        self._db.executemany(
            "INSERT INTO refusals VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
            " SET count = count + excluded.count, last = excluded.last",
            [(*key, count, last) for key, (count, last) in refusals.items()],
        )

    def all(self) -> list[RefusalCount]:
        rows = self._db.execute("SELECT device, kind, count, last FROM refusals ORDER BY count DESC, device, kind")
        return [RefusalCount(*row) for row in rows]
