"""The server's files. The server may be killed at any time.

    RUN/run.sqlite       settings, events since the present round opened (with --audit all of the session), records of
                         closed rounds, counts of refused messages
    RUN/tensors/         see `trainer_server.storage.run_blobs`
    RUN/experts/         see `trainer_server.storage.kept_experts`
    and small files      see `trainer_server.storage.run_files`

Order of writes: first the tensors, then their event, then the acknowledgement. So a crash leaves at most tensors that
no row names.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from pydantic import BaseModel

from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.messages import Update
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from trainer_server.config import RunConfig
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.state import State
from trainer_server.coordinator.warm_start import WarmStart
from trainer_server.storage.checkpoint import Checkpoint, vectors_of
from trainer_server.storage.checkpoint_rows import CheckpointRows
from trainer_server.storage.database import SCHEMA, check_version, is_readable, open_database
from trainer_server.storage.event_rows import Kind, LoggedEvent, from_row, to_row
from trainer_server.storage.origin import Origin
from trainer_server.storage.refusal_counts import RefusalCounts
from trainer_server.storage.round_records import RoundRecords
from trainer_server.storage.run_blobs import RunBlobs
from trainer_server.storage.run_files import RunFiles
from trainer_server.storage.start_record import Start, warm_start_of
from trainer_server.storage.update_files import Place

DATABASE = "run.sqlite"
TENSORS = "tensors"
BUSY_SECONDS = 10.0
CACHE_KB = 256  # of the database; the operating system has the rest


class _Vectors(BaseModel):
    """Header of a checkpoint's tensors, or any header."""


class RunStore:
    """The folder of one run. It can be read while a server writes."""

    def __init__(self, folder: Path, busy_seconds: float = BUSY_SECONDS) -> None:
        """Waits up to `busy_seconds` for another process's transaction.

        Raises ConfigError if `folder` is a file, RunError if it holds no run or cannot be read.
        """
        require_folder(folder)
        path = folder / DATABASE
        if not is_readable(folder):
            raise RunError(f"this user may not read {folder}; run the command as the server's user")
        if not path.is_file():
            raise RunError(f"no run at {folder}: {DATABASE} is missing; start one with python -m trainer_server start")
        self.folder = folder
        self.files = RunFiles(folder)
        try:
            self._db = open_database(path, busy_seconds)
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(f"PRAGMA cache_size = -{CACHE_KB}")
            (origin, self.ended) = self._db.execute("SELECT origin, ended FROM run").fetchone()
            check_version(path, origin, self._db)
            self.origin = Origin.model_validate_json(origin)
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); is it a run of this version?") from error
        self.blobs = RunBlobs(folder / TENSORS, self._db)
        self.rounds = RoundRecords(self._db)
        self._checkpoints = CheckpointRows(self._db)
        self.refusals = RefusalCounts(self._db)

    @classmethod
    def create(cls, folder: Path, origin: Origin, task: Task, start: Start | None = None) -> RunStore:
        """Raises OSError or sqlite3.Error if it cannot be written."""
        origin = origin.model_copy(update={"start": start.origin if start else None})
        folder.mkdir(0o700, parents=True, exist_ok=True)  # it holds updates of devices
        (folder / TENSORS).mkdir(exist_ok=True)
        RunFiles(folder).write_task(task)
        _write_start(folder, start)
        with closing(sqlite3.connect(folder / DATABASE, timeout=BUSY_SECONDS, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.executescript(f"BEGIN; {SCHEMA}")
            if db.execute("SELECT count(*) FROM run").fetchone() == (0,):
                db.execute("INSERT INTO run (origin) VALUES (?)", (origin.model_dump_json(),))
            db.execute("COMMIT")
        return cls(folder)

    def close(self) -> None:
        self.blobs.updates.close()
        self._db.close()

    def task(self) -> Task:
        """The task of the present session. Raises RunError if its file is missing or altered."""
        return self.files.task(self.origin.task)

    def warm_start(self) -> WarmStart | None:
        """What the run goes on from. Raises RunError if its tensor file is missing or altered."""
        start = self.origin.start
        return warm_start_of(start, self.blobs.unpack(start.sha256, _Vectors)[1]) if start else None

    def is_unstarted(self) -> bool:
        """Whether no event has been stored yet."""
        query = "SELECT (SELECT count(*) FROM checkpoints) + (SELECT count(*) FROM events) = 0"
        return self.ended is None and bool(self._db.execute(query).fetchone()[0])

    def reset(self, config: RunConfig, bundle: TaskBundle, start: Start | None = None) -> None:
        """Replaces the settings of an unstarted run."""
        self.files.write_task(bundle.task)
        _write_start(self.folder, start)
        renewed = {
            "config": config,
            "bundle": bundle.root.absolute(),
            "sha256": bundle.sha256,
            "task": bundle.task.sha256,
            "start": start.origin if start else None,
        }
        self.origin = self.origin.model_copy(update=renewed)
        self._db.execute("UPDATE run SET origin = ?", (self.origin.model_dump_json(),))

    # writing

    def commit(
        self,
        events: Sequence[LoggedEvent],
        rounds: Iterable[ClosedRound] = (),
        refusals: Mapping[tuple[str, str], tuple[int, str]] | None = None,
        ended: str | None = None,
        reopens: bool = False,
        blobs: Mapping[str, Place] | None = None,
    ) -> None:
        """Stores everything durably, in one transaction. `reopens`: the run has not ended any more. `blobs`: where
        those of the updates among the events are, by SHA-256. Raises sqlite3.Error or OSError if it cannot be written.
        """
        if blobs:
            self.blobs.updates.sync()
        with self._transaction():
            self.blobs.place(blobs or {})
            self._db.executemany(
                "INSERT INTO events (at, kind, body, sha256, size) VALUES (?, ?, ?, ?, ?)", map(to_row, events)
            )
            self.rounds.add(rounds, self.origin.config)
            self.refusals.add(refusals or {})
            if ended is not None or reopens:
                self._db.execute("UPDATE run SET ended = ?", (ended,))
        if ended is not None or reopens:
            self.ended = ended
        self.files.touch()

    def begin_session(
        self,
        origin: Origin,
        task: Task,
        start: Start | None,
        state: State,
        at: float,
        closed: Sequence[ClosedRound] = (),
        refusals: Mapping[tuple[str, str], tuple[int, str]] | None = None,
    ) -> None:
        """Replaces the present session by the next one, in one transaction: with its first `state`, without the events
        and checkpoints of the former session. Records of rounds stay, and those of `closed` are added.

        Raises OSError or sqlite3.Error if it cannot be written; the former session goes on then.
        """
        self.files.write_task(task)
        _write_start(self.folder, start)
        sha256 = self.blobs.write(pack(_Vectors(), vectors_of(state)))
        with self._transaction():
            numbers = "SELECT seq FROM events UNION SELECT seq FROM checkpoints"
            (last,) = self._db.execute(f"SELECT coalesce(max(seq), 0) FROM ({numbers})").fetchone()
            self._db.execute("DELETE FROM events")
            self._db.execute("DELETE FROM blobs")
            self._checkpoints.add(last, at, Checkpoint.of(state), sha256)
            self._checkpoints.delete_before(last)
            self.rounds.add(closed, origin.config)
            self.refusals.add(refusals or {})
            self._db.execute("UPDATE run SET origin = ?", (origin.model_dump_json(),))
        self.origin = origin
        self.files.touch()
        with contextlib.suppress(OSError):  # the session has begun
            self.blobs.begin()
            self._sweep()
            self.files.keep_tasks((origin.task, origin.first.task))

    def save_checkpoint(self, state: State, at: float) -> None:
        """Stores the state. Deletes earlier events, checkpoints and tensors; with --audit only those of rounds before
        --keep-rounds.

        Raises OSError or sqlite3.Error if it cannot be written; the previous checkpoint is valid then.
        """
        sha256 = self.blobs.write(pack(_Vectors(), vectors_of(state)))
        with self._transaction():
            (last,) = self._db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()
            self._checkpoints.add(last, at, Checkpoint.of(state), sha256)
            first = self._first_needed(last)
            if first:  # else all events stay, and reading a hundred thousand of them takes 0.4 s
                self._db.execute("DELETE FROM events WHERE seq <= ?", (first,))
                self._checkpoints.delete_before(first)
                unused = "DELETE FROM blobs WHERE sha256 NOT IN (SELECT sha256 FROM events WHERE sha256 IS NOT NULL)"
                self._db.execute(unused)
        self.blobs.begin()
        if first:
            self._sweep()

    def _sweep(self) -> None:
        """Deletes the tensors that neither a checkpoint nor an event nor the start of the session names."""
        query = "SELECT sha256 FROM checkpoints UNION SELECT sha256 FROM events WHERE sha256 IS NOT NULL"
        needed = {name for (name,) in self._db.execute(query)}
        self.blobs.sweep(needed | ({self.origin.start.sha256} if self.origin.start else set()))

    def _first_needed(self, last: int) -> int:
        """Number of the checkpoint from which the run has to be kept; 0 if all of it."""
        config = self.origin.config
        if not config.audit:
            return last
        query = "SELECT seq FROM checkpoints ORDER BY seq DESC LIMIT 1 OFFSET ?"
        row = self._db.execute(query, (config.keep_rounds,)).fetchone()
        return int(row[0]) if row else 0

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    # reading

    def checkpoint(self) -> tuple[Checkpoint, float] | None:
        """The last checkpoint and its time. None before the first round."""
        found = self._checkpoints.last()
        return found[:2] if found else None

    def checkpoint_number(self) -> int:
        """That of the last checkpoint, which is higher than that of earlier ones; 0 before the first round."""
        (number,) = self._db.execute("SELECT coalesce(max(seq) + 1, 0) FROM checkpoints").fetchone()
        return int(number)

    def state(self) -> tuple[State, float] | None:
        """The state in the last checkpoint and its time. Raises RunError if its tensor file is missing or altered."""
        return self._state(self._checkpoints.last())

    def first_state(self) -> tuple[State, float] | None:
        """The state from which the kept events go on. None if they are all events of the run. Raises RunError as
        `state` does."""
        query = "SELECT (SELECT min(seq) FROM checkpoints) < coalesce((SELECT min(seq) FROM events), 1 << 62)"
        (was_cut,) = self._db.execute(query).fetchone()
        return self._state(self._checkpoints.first()) if was_cut else None

    def _state(self, found: tuple[Checkpoint, float, str] | None) -> tuple[State, float] | None:
        if found is None:
            return None
        checkpoint, at, sha256 = found
        return checkpoint.state(self.blobs.unpack(sha256, _Vectors)[1]), at

    def events(self, *kinds: Kind, since_checkpoint: bool = True) -> Iterator[LoggedEvent]:
        """Events of these kinds (none: of all) in order, updates with their tensors. Raises RunError as `RunBlobs.read`
        does."""
        last = "SELECT coalesce(max(seq), 0) FROM checkpoints" if since_checkpoint else "SELECT 0"
        chosen = f"kind IN ({', '.join('?' * len(kinds))})" if kinds else "true"
        query = f"SELECT at, kind, body, sha256, size FROM events WHERE seq > ({last}) AND {chosen} ORDER BY seq"
        for row in self._db.execute(query, kinds):
            yield from_row(row, lambda sha256: self.blobs.unpack(sha256, Update))

    def pending_updates(self) -> dict[str, int]:
        """Number of updates accepted since the last checkpoint, by device."""
        query = (
            "SELECT json_extract(body, '$.device'), count(*) FROM events WHERE kind = 'update' AND seq >"
            " (SELECT coalesce(max(seq), 0) FROM checkpoints) GROUP BY 1 ORDER BY 1"
        )
        return dict(self._db.execute(query).fetchall())


def require_folder(folder: Path) -> None:
    """Raises ConfigError if `folder` is a file."""
    if folder.is_file():
        raise ConfigError(f"--out {folder} is a file; pass a folder")


def _write_start(folder: Path, start: Start | None) -> None:
    """Raises OSError."""
    if start:
        write_atomically(folder / TENSORS / start.origin.sha256, start.blob, durable=True)
