"""Records of closed rounds, in RUN/run.sqlite.

Records of rounds that are too old keep no values of single devices (see DETAILS); those before --keep-rounds are
deleted, and only counted.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable

from fedfmsl.protocol.messages import Stage, Update
from trainer_server.config import RunConfig
from trainer_server.coordinator.records import ClosedRound, RoundSummary
from trainer_server.coordinator.state import TRAINING

DETAILS = 500_000  # headers of updates in the records of rounds, of about 400 bytes each; older records have none


class RoundRecords:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    def add(self, rounds: Iterable[ClosedRound], config: RunConfig) -> None:
        """Within a transaction of the caller. `config`: of the run. A record never is in memory as a whole text."""
        for closed in rounds:
            number, summary = closed.round.round, RoundSummary.of_record(closed)
            record = closed.model_copy(update={"updates": {}, "bytes_up": {}, "missing": ()})
            row = (number, time.time(), record.model_dump_json(), summary.model_dump_json())
            self._db.execute("INSERT INTO rounds VALUES (?, ?, ?, ?)", row)
            self._db.executemany(
                "INSERT INTO round_devices VALUES (?, ?, ?, ?)",
                (
                    (number, device, update.model_dump_json(), closed.bytes_up[device])
                    for device, update in closed.updates.items()
                ),
            )
            self._db.executemany(
                "INSERT INTO round_devices VALUES (?, ?, NULL, NULL)", ((number, device) for device in closed.missing)
            )
            self._delete_details(number - max(DETAILS // config.devices, 1), with_chosen=not config.audit)
            self._delete(number - config.keep_rounds)

    def _delete_details(self, last: int, with_chosen: bool) -> None:
        """Deletes the values of single devices in the records up to that round. `with_chosen`: also the names in the
        announcement, which a replay compares."""
        self._db.execute("DELETE FROM round_devices WHERE round <= ?", (last,))
        if with_chosen:
            without = "UPDATE rounds SET record = json_set(record, '$.round.chosen', json('[]')) WHERE round = ?"
            self._db.execute(without, (last,))

    def _delete(self, last: int) -> None:
        """Deletes the records up to that round, and adds them to the counts of deleted rounds."""
        count = (
            "INSERT INTO deleted_rounds SELECT json_extract(record, '$.round.stage'),"
            " json_extract(record, '$.repeated') != '', count(*) FROM rounds WHERE round <= ? GROUP BY 1, 2"
            " ON CONFLICT DO UPDATE SET count = count + excluded.count"
        )
        self._db.execute(count, (last,))
        self._db.execute("DELETE FROM rounds WHERE round <= ?", (last,))
        self._db.execute("DELETE FROM round_devices WHERE round <= ?", (last,))

    def all(self, after: int = 0) -> list[ClosedRound]:
        """Of the closed rounds with a number above `after`."""
        rows = self._db.execute("SELECT round, record FROM rounds WHERE round > ? ORDER BY round", (after,)).fetchall()
        return [self._whole(*row) for row in rows]

    def one(self, number: int) -> ClosedRound | None:
        """That of a closed round; None if there is none."""
        row = self._db.execute("SELECT round, record FROM rounds WHERE round = ?", (number,)).fetchone()
        return self._whole(*row) if row else None

    def _whole(self, number: int, record: str) -> ClosedRound:
        query = "SELECT device, answer, bytes_up FROM round_devices WHERE round = ? ORDER BY device"
        updates, bytes_up, missing = {}, {}, []
        for device, answer, size in self._db.execute(query, (number,)):
            if answer is None:
                missing.append(device)
            else:
                updates[device], bytes_up[device] = Update.model_validate_json(answer), size
        values = {"updates": updates, "bytes_up": bytes_up, "missing": tuple(missing)}
        return ClosedRound.model_validate_json(record).model_copy(update=values)

    def summaries(self, after: int = 0) -> list[tuple[RoundSummary, float]]:
        """Of the closed rounds with a number above `after`, each with the moment when it was closed (unix seconds)."""
        rows = self._db.execute("SELECT summary, closed_at FROM rounds WHERE round > ? ORDER BY round", (after,))
        return [(RoundSummary.model_validate_json(summary), at) for summary, at in rows]

    def participation(self, after: int = 0, until: int = 1 << 62) -> tuple[dict[str, int], int]:
        """In how many training rounds with a number above `after` and up to `until` each device took part, and how many
        there were. Repeated ones do not count, nor those whose record has no details any more."""
        stages = ", ".join(f"'{stage.value}'" for stage in TRAINING)
        answers = (
            "FROM round_devices JOIN rounds USING (round) WHERE round > ? AND round <= ? AND answer IS NOT NULL AND"
            f" json_extract(record, '$.repeated') = '' AND json_extract(record, '$.round.stage') IN ({stages})"
        )
        (total,) = self._db.execute(f"SELECT count(DISTINCT round) {answers}", (after, until)).fetchone()
        by_device = self._db.execute(f"SELECT device, count(*) {answers} GROUP BY device", (after, until))
        return dict(by_device.fetchall()), total

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
