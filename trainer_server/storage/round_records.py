"""Records of closed rounds, in RUN/run.sqlite.

Records of rounds that are too old keep no values of single devices (see DETAILS); those before --keep-rounds are
deleted, and only counted.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable

from fedfmsl.protocol.messages import Stage
from trainer_server.config import RunConfig
from trainer_server.coordinator.records import ClosedRound, RoundSummary
from trainer_server.coordinator.state import TRAINING

DETAILS = 500_000  # headers of updates in the records of rounds, of about 400 bytes each; older records have none


class RoundRecords:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def add(self, rounds: Iterable[ClosedRound], config: RunConfig) -> None:
        """Within a transaction of the caller. `config`: of the run."""
        rounds = list(rounds)
        self._db.executemany(
            "INSERT INTO rounds VALUES (?, ?, ?, ?)",
            [
                (
                    closed.round.round,
                    time.time(),
                    closed.model_dump_json(),
                    RoundSummary.of_record(closed).model_dump_json(),
                )
                for closed in rounds
            ],
        )
        chosen = "" if config.audit else ", '$.round.chosen', json('[]')"  # a replay compares it
        without_details = (
            "UPDATE rounds SET record = json_set(record, '$.updates', json('{}'), '$.bytes_up', json('{}'),"
            f" '$.missing', json('[]'){chosen}) WHERE round = ?"
        )
        kept = max(DETAILS // config.devices, 1)
        self._db.executemany(without_details, [(closed.round.round - kept,) for closed in rounds])
        if rounds:
            self._delete(rounds[-1].round.round - config.keep_rounds)

    def _delete(self, last: int) -> None:
        """Deletes the records up to that round, and adds them to the counts of deleted rounds."""
        count = (
            "INSERT INTO deleted_rounds SELECT json_extract(record, '$.round.stage'),"
            " json_extract(record, '$.repeated') != '', count(*) FROM rounds WHERE round <= ? GROUP BY 1, 2"
            " ON CONFLICT DO UPDATE SET count = count + excluded.count"
        )
        self._db.execute(count, (last,))
        self._db.execute("DELETE FROM rounds WHERE round <= ?", (last,))

    def all(self, after: int = 0) -> list[ClosedRound]:
        """Of the closed rounds with a number above `after`."""
        rows = self._db.execute("SELECT record FROM rounds WHERE round > ? ORDER BY round", (after,))
        return [ClosedRound.model_validate_json(record) for (record,) in rows]

    def one(self, number: int) -> ClosedRound | None:
        """That of a closed round; None if there is none."""
        row = self._db.execute("SELECT record FROM rounds WHERE round = ?", (number,)).fetchone()
        return ClosedRound.model_validate_json(row[0]) if row else None

    def summaries(self, after: int = 0) -> list[tuple[RoundSummary, float]]:
        """Of the closed rounds with a number above `after`, each with the moment when it was closed (unix seconds)."""
        rows = self._db.execute("SELECT summary, closed_at FROM rounds WHERE round > ? ORDER BY round", (after,))
        return [(RoundSummary.model_validate_json(summary), at) for summary, at in rows]

    def participation(self, after: int = 0, until: int = 1 << 62) -> tuple[dict[str, int], int]:
        """In how many training rounds with a number above `after` and up to `until` each device took part, and how many
        there were. Repeated ones do not count, nor those whose record has no details any more."""
        stages = ", ".join(f"'{stage.value}'" for stage in TRAINING)
        trained = (
            "(SELECT record FROM rounds WHERE round > ? AND round <= ? AND json_extract(record, '$.repeated') = '' AND"
            " json_extract(record, '$.updates') != '{}' AND"
            f" json_extract(record, '$.round.stage') IN ({stages}))"
        )
        by_device = f"SELECT key, count(*) FROM {trained}, json_each(record, '$.updates') GROUP BY key"
        (total,) = self._db.execute(f"SELECT count(*) FROM {trained}", (after, until)).fetchone()
        return dict(self._db.execute(by_device, (after, until)).fetchall()), total

    def counts(self) -> dict[tuple[Stage, bool], int]:
        """How many rounds the run has closed, also those whose records are deleted, by stage and whether they were
        repeated."""
        stage, repeated = "json_extract(record, '$.round.stage')", "json_extract(record, '$.repeated') != ''"
        query = (
            f"SELECT stage, repeated, sum(count) FROM (SELECT {stage} AS stage, {repeated} AS repeated, 1 AS count"
            " FROM rounds UNION ALL SELECT stage, repeated, count FROM deleted_rounds) GROUP BY 1, 2"
        )
        return {(Stage(stage), bool(repeated)): count for stage, repeated, count in self._db.execute(query).fetchall()}

    def repetitions(self) -> list[str]:
        """Why rounds were repeated, in order."""
        query = "SELECT json_extract(record, '$.repeated') AS why FROM rounds WHERE why != '' ORDER BY round"
        return [why for (why,) in self._db.execute(query).fetchall()]

    def rejections(self) -> dict[int, str]:
        """By closed round, why the global expert that its devices measured was rejected."""
        query = (
            "SELECT round, json_extract(record, '$.rejected') AS why FROM rounds WHERE coalesce(why, '') != '' "
            "ORDER BY round"
        )
        return dict(self._db.execute(query).fetchall())
