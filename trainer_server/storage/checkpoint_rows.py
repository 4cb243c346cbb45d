"""Checkpoints of a run, in RUN/run.sqlite. With ten thousand devices one has megabytes: it is written in pieces."""

from __future__ import annotations

import sqlite3

from trainer_server.storage.checkpoint import Checkpoint, join, pieces_of


class CheckpointRows:
    """`seq`: the number of the last event before a checkpoint."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def add(self, seq: int, at: float, checkpoint: Checkpoint, sha256: str) -> None:
        """Within a transaction of the caller. `at`: its time. `sha256`: of its tensors."""
        rest, pieces = pieces_of(checkpoint)
        self._db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)", (seq, at, rest, sha256))
        self._db.execute("DELETE FROM checkpoint_pieces WHERE seq = ?", (seq,))
        rows = ((seq, field, first, items) for field, first, items in pieces)
        self._db.executemany("INSERT INTO checkpoint_pieces VALUES (?, ?, ?, ?)", rows)

    def delete_before(self, seq: int) -> None:
        """Within a transaction of the caller."""
        for table in ("checkpoints", "checkpoint_pieces"):
            self._db.execute(f"DELETE FROM {table} WHERE seq < ?", (seq,))

    def last(self) -> tuple[Checkpoint, float, str] | None:
        """The last checkpoint, its time, and the SHA-256 of its tensors; None before the first round."""
        return self._one("max")

    def first(self) -> tuple[Checkpoint, float, str] | None:
        """The same of the first one that is kept."""
        return self._one("min")

    def _one(self, which: str) -> tuple[Checkpoint, float, str] | None:
        query = f"SELECT seq, at, state, sha256 FROM checkpoints WHERE seq = (SELECT {which}(seq) FROM checkpoints)"
        self._db.execute("BEGIN")  # else a server may delete the pieces between the two queries
        try:
            row = self._db.execute(query).fetchone()
            if row is None:
                return None
            seq, at, rest, sha256 = row
            query = "SELECT field, items FROM checkpoint_pieces WHERE seq = ? ORDER BY field, first"
            return join(rest, self._db.execute(query, (seq,))), at, sha256
        finally:
            self._db.execute("COMMIT")
