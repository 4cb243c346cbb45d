"""The server's files. The server may be killed at any time.

    RUN/run.sqlite       settings, events since the present round opened (with --audit all of the session), records of
                         closed rounds, counts of refused messages
    RUN/lock             held by the server of the run; names its process, and was changed at its last event
    RUN/joined.json      before the first round: the devices that are online
    RUN/certificates.json  when the certificates of server and broker expire
    RUN/outage.json      since when and why there is no connection to the broker
    RUN/tasks/SHA256     the tasks of the run's first and present session
    RUN/tensors/SHA256   the checkpoint's tensors, and what the run goes on from
    RUN/tensors/updates-N  the updates accepted after it (see `trainer_server.storage.update_files`)
    RUN/experts/         see `trainer_server.storage.kept_experts`

Order of writes: first the tensors, then their event, then the acknowledgement. So a crash leaves at most tensors that
no row names.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.common.files import EXHAUSTED, write_atomically
from fedfmsl.common.lock_file import held, is_held, process_of
from fedfmsl.errors import BundleError, ConfigError, MessageError, RunError
from fedfmsl.protocol.messages import DeviceStatus, Stage, Update, parse
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import Header, blob_hash, pack, tensors_of, unpack
from trainer_server.config import RunConfig
from trainer_server.coordinator.events import (
    ClockTicked,
    Event,
    LimitsChanged,
    OperatorActed,
    RestChanged,
    StatusSeen,
    UpdateRefused,
    UpdateSeen,
)
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.operator import Operation, after_operation, after_operations
from trainer_server.coordinator.records import ClosedRound, RoundSummary
from trainer_server.coordinator.state import TRAINING, State
from trainer_server.coordinator.warm_start import WarmStart
from trainer_server.storage.checkpoint import Checkpoint, vectors_of
from trainer_server.storage.database import SCHEMA, check_version, is_readable, open_database
from trainer_server.storage.origin import Origin
from trainer_server.storage.start_record import Start, warm_start_of
from trainer_server.storage.update_files import Place, UpdateFiles

DATABASE = "run.sqlite"
TASKS = "tasks"
JOINED = "joined.json"
OUTAGE = "outage.json"
CERTIFICATES = "certificates.json"
BUSY_SECONDS = 10.0
DETAILS = 500_000  # headers of updates in the records of rounds, of about 400 bytes each; older records have none


@dataclass(frozen=True)
class LoggedEvent:
    """An event that changed the state, and its time on the run's clock."""

    at: float
    event: Event


@dataclass(frozen=True)
class RefusalCount:
    """How often messages of one kind from one device were refused. `last`: the text of the latest refusal."""

    device: str
    kind: str
    count: int
    last: str


class _Vectors(BaseModel):
    """Header of a checkpoint's tensors, or any header."""


@dataclass(frozen=True)
class ServerProcess:
    """`runs`: None if this user may not know. `pid`: None if unknown. `last_event`: unix seconds; 0: none."""

    runs: bool | None
    pid: int | None
    last_event: float


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
        self.updates = UpdateFiles(self.tensors)
        self._verified: set[str] = set()  # SHA-256 of blobs of updates that this process has read
        try:
            self._db = open_database(path, busy_seconds)
            self._db.execute("PRAGMA synchronous = FULL")
            (origin, self.ended) = self._db.execute("SELECT origin, ended FROM run").fetchone()
            check_version(path, origin)
            self.origin = Origin.model_validate_json(origin)
            new = "SELECT summary, count, start FROM rounds, deleted_rounds, blobs LIMIT 0"  # not in earlier versions
            self._db.execute(new)
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise RunError(f"{path} cannot be read ({error}); is it a run of this version?") from error

    @classmethod
    def create(cls, folder: Path, origin: Origin, task: Task, start: Start | None = None) -> RunStore:
        """Raises OSError or sqlite3.Error if it cannot be written."""
        origin = origin.model_copy(update={"start": start.origin if start else None})
        folder.mkdir(0o700, parents=True, exist_ok=True)  # it holds updates of devices
        (folder / "tensors").mkdir(exist_ok=True)
        _write_task(folder, task)
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
        self.updates.close()
        self._db.close()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Excludes other servers within this context. Raises RunError if another server has the lock."""
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self._lock))
            except BlockingIOError as error:
                raise RunError(f"another server runs in {self.folder}; stop it first") from error
            yield

    @property
    def _lock(self) -> Path:
        return self.folder / "lock"

    def server(self) -> ServerProcess:
        """The process that coordinates this run, or did so last."""
        try:
            at = 0.0 if self.is_unstarted() else self._lock.stat().st_mtime
        except OSError:
            at = 0.0
        return ServerProcess(is_held(self._lock), process_of(self._lock), at)

    def task(self) -> Task:
        """The task of the present session. Raises RunError if its file is missing or altered."""
        path = self.folder / TASKS / self.origin.task
        try:
            task = Task.read(path)
        except BundleError as error:
            raise RunError(f"{error}; or restore the file from a backup") from error
        if task.sha256 != self.origin.task:
            raise RunError(f"{path} was altered (wrong SHA-256); restore it from a backup")
        return task

    # tensors

    @property
    def tensors(self) -> Path:
        return self.folder / "tensors"

    def read(self, sha256: str) -> Tensors:
        """The tensors of an accepted update or a kept global expert. Raises RunError if its file is missing or altered,
        OSError if no file can be opened."""
        return tensors_of(self._blob(sha256))

    def _unpack(self, sha256: str, header_type: type[Header]) -> tuple[Header, Tensors]:
        try:
            return unpack(self._blob(sha256), header_type)
        except MessageError as error:
            raise RunError(f"{self.tensors / sha256}: {error}") from error

    def _blob(self, sha256: str) -> bytes:
        row = self._db.execute("SELECT file, start, size FROM blobs WHERE sha256 = ?", (sha256,)).fetchone()
        path = self.tensors / (UpdateFiles.name(row[0]) if row else sha256)
        try:
            blob = self.updates.read(Place(*row)) if row else path.read_bytes()
        except OSError as error:
            if error.errno in EXHAUSTED:  # the file is not what fails
                raise
            raise RunError(f"{path} cannot be read ({error.strerror}); restore it from a backup") from error
        if sha256 not in self._verified and blob_hash(blob) != sha256:
            raise RunError(f"{path} was altered (wrong SHA-256); restore it from a backup")
        if row:
            self._verified.add(sha256)
        return blob

    def warm_start(self) -> WarmStart | None:
        """What the run goes on from. Raises RunError if its tensor file is missing or altered."""
        start = self.origin.start
        return warm_start_of(start, self._unpack(start.sha256, _Vectors)[1]) if start else None

    def is_unstarted(self) -> bool:
        """Whether no event has been stored yet."""
        query = "SELECT (SELECT count(*) FROM checkpoints) + (SELECT count(*) FROM events) = 0"
        return self.ended is None and bool(self._db.execute(query).fetchone()[0])

    def reset(self, config: RunConfig, bundle: TaskBundle, start: Start | None = None) -> None:
        """Replaces the settings of an unstarted run."""
        _write_task(self.folder, bundle.task)
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

        Records of rounds that are too old keep no values of single devices (see DETAILS); those before --keep-rounds
        are deleted, and only counted.
        """
        if blobs:
            self.updates.sync()
        with self._transaction():
            places = [(sha256, *place) for sha256, place in (blobs or {}).items()]
            self._db.executemany("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, ?)", places)
            self._db.executemany(
                "INSERT INTO events (at, kind, body, sha256, size) VALUES (?, ?, ?, ?, ?)", map(_to_row, events)
            )
            self._add_rounds(rounds)
            self._count(refusals or {})
            if ended is not None or reopens:
                self._db.execute("UPDATE run SET ended = ?", (ended,))
        if ended is not None or reopens:
            self.ended = ended
        self._touch()

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
        blob = pack(_Vectors(), vectors_of(state))
        _write_task(self.folder, task)
        _write_start(self.folder, start)
        write_atomically(self.tensors / blob_hash(blob), blob, durable=True)
        row = (at, Checkpoint.of(state).model_dump_json(), blob_hash(blob))
        with self._transaction():
            numbers = "SELECT seq FROM events UNION SELECT seq FROM checkpoints"
            (last,) = self._db.execute(f"SELECT coalesce(max(seq), 0) FROM ({numbers})").fetchone()
            self._db.execute("DELETE FROM events")
            self._db.execute("DELETE FROM blobs")
            self._db.execute("DELETE FROM checkpoints")
            self._db.execute("INSERT INTO checkpoints VALUES (?, ?, ?, ?)", (last, *row))
            self._add_rounds(closed)
            self._count(refusals or {})
            self._db.execute("UPDATE run SET origin = ?", (origin.model_dump_json(),))
        self.origin = origin
        self._touch()
        with contextlib.suppress(OSError):  # the session has begun
            self.updates.begin()
            self._sweep()
            for path in (self.folder / TASKS).iterdir():
                if path.name not in (origin.task, origin.first.task):
                    path.unlink(missing_ok=True)

    def _touch(self) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._lock)  # for `server`

    def _add_rounds(self, rounds: Iterable[ClosedRound]) -> None:
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
        chosen = "" if self.origin.config.audit else ", '$.round.chosen', json('[]')"  # a replay compares it
        without_details = (
            "UPDATE rounds SET record = json_set(record, '$.updates', json('{}'), '$.bytes_up', json('{}'),"
            f" '$.missing', json('[]'){chosen}) WHERE round = ?"
        )
        kept = max(DETAILS // self.origin.config.devices, 1)
        self._db.executemany(without_details, [(closed.round.round - kept,) for closed in rounds])
        if rounds:
            self._delete_rounds(rounds[-1].round.round - self.origin.config.keep_rounds)

    def _count(self, refusals: Mapping[tuple[str, str], tuple[int, str]]) -> None:
        self._db.executemany(
            "INSERT INTO refusals VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
            " SET count = count + excluded.count, last = excluded.last",
            [(*key, count, last) for key, (count, last) in refusals.items()],
        )

    def _delete_rounds(self, last: int) -> None:
        """Deletes the records up to that round, and adds them to the counts of deleted rounds."""
        count = (
            "INSERT INTO deleted_rounds SELECT json_extract(record, '$.round.stage'),"
            " json_extract(record, '$.repeated') != '', count(*) FROM rounds WHERE round <= ? GROUP BY 1, 2"
            " ON CONFLICT DO UPDATE SET count = count + excluded.count"
        )
        self._db.execute(count, (last,))
        self._db.execute("DELETE FROM rounds WHERE round <= ?", (last,))

    def save_checkpoint(self, state: State, at: float) -> None:
        """Stores the state. Deletes earlier events, checkpoints and tensors; with --audit only those of rounds before
        --keep-rounds.

        Raises OSError or sqlite3.Error if it cannot be written; the previous checkpoint is valid then.
        """
        blob = pack(_Vectors(), vectors_of(state))
        sha256 = blob_hash(blob)
        checkpoint = Checkpoint.of(state).model_dump_json()
        write_atomically(self.tensors / sha256, blob, durable=True)
        with self._transaction():
            (last,) = self._db.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()
            self._db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)", (last, at, checkpoint, sha256))
            first = self._first_needed(last)
            self._db.execute("DELETE FROM events WHERE seq <= ?", (first,))
            self._db.execute("DELETE FROM checkpoints WHERE seq < ?", (first,))
            unused = "DELETE FROM blobs WHERE sha256 NOT IN (SELECT sha256 FROM events WHERE sha256 IS NOT NULL)"
            self._db.execute(unused)
        self.updates.begin()
        self._verified.clear()
        if first:
            self._sweep()

    def _sweep(self) -> None:
        """Deletes the tensors that neither a checkpoint nor an event nor the start of the session names."""
        query = "SELECT sha256 FROM checkpoints UNION SELECT sha256 FROM events WHERE sha256 IS NOT NULL"
        needed = {name for (name,) in self._db.execute(query)}
        needed |= {self.origin.start.sha256} if self.origin.start else set()
        needed |= {UpdateFiles.name(file) for (file,) in self._db.execute("SELECT DISTINCT file FROM blobs")}
        for path in self.tensors.iterdir():
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def _first_needed(self, last: int) -> int:
        """Number of the checkpoint from which the run has to be kept; 0 if all of it."""
        config = self.origin.config
        if not config.audit:
            return last
        query = "SELECT seq FROM checkpoints ORDER BY seq DESC LIMIT 1 OFFSET ?"
        row = self._db.execute(query, (config.keep_rounds,)).fetchone()
        return int(row[0]) if row else 0

    def save_joined(self, devices: Iterable[str]) -> None:
        """Stores which devices are online before the first round, for `joined`. Raises OSError."""
        write_atomically(self.folder / JOINED, json.dumps(sorted(devices)).encode())

    def save_outage(self, since: float, reason: str) -> None:
        """Stores why the server has no connection to the broker, for `outage`. Raises OSError."""
        write_atomically(self.folder / OUTAGE, json.dumps([since, reason]).encode())

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
        row = self._db.execute("SELECT state, at FROM checkpoints ORDER BY seq DESC LIMIT 1").fetchone()
        return (Checkpoint.model_validate_json(row[0]), row[1]) if row else None

    def checkpoint_number(self) -> int:
        """That of the last checkpoint, which is higher than that of earlier ones; 0 before the first round."""
        (number,) = self._db.execute("SELECT coalesce(max(seq) + 1, 0) FROM checkpoints").fetchone()
        return int(number)

    def state(self) -> tuple[State, float] | None:
        """The state in the last checkpoint and its time. Raises RunError if its tensor file is missing or altered."""
        return self._state("SELECT state, sha256, at FROM checkpoints ORDER BY seq DESC LIMIT 1")

    def first_state(self) -> tuple[State, float] | None:
        """The state from which the kept events go on. None if they are all events of the run. Raises RunError as
        `state` does."""
        query = "SELECT (SELECT min(seq) FROM checkpoints) < coalesce((SELECT min(seq) FROM events), 1 << 62)"
        (was_cut,) = self._db.execute(query).fetchone()
        return self._state("SELECT state, sha256, at FROM checkpoints ORDER BY seq LIMIT 1") if was_cut else None

    def _state(self, query: str) -> tuple[State, float] | None:
        row = self._db.execute(query).fetchone()
        if row is None:
            return None
        _, vectors = self._unpack(row[1], _Vectors)
        return Checkpoint.model_validate_json(row[0]).state(vectors), row[2]

    def joined(self) -> list[str]:
        """The devices that were online at the last `save_joined`."""
        try:
            return list(json.loads((self.folder / JOINED).read_bytes()))
        except FileNotFoundError:
            return []

    def save_certificates(self, until: Mapping[str, float]) -> None:
        """Stores when certificates expire (unix seconds), by the name of their owner, for `certificates`. Raises
        OSError."""
        write_atomically(self.folder / CERTIFICATES, json.dumps(dict(until)).encode())

    def certificates(self) -> dict[str, float]:
        try:
            return dict(json.loads((self.folder / CERTIFICATES).read_bytes()))
        except FileNotFoundError:
            return {}

    def outage(self) -> tuple[float, str]:
        """Since when (unix seconds) and why the server had no connection at the last `save_outage`; 0 and "" if it had
        one."""
        try:
            since, reason = json.loads((self.folder / OUTAGE).read_bytes())
        except FileNotFoundError:
            return 0.0, ""
        return float(since), str(reason)

    def events(self, since_checkpoint: bool = True) -> Iterator[LoggedEvent]:
        """Events in order, updates with their tensors. Raises RunError as `read` does."""
        last = "SELECT coalesce(max(seq), 0) FROM checkpoints" if since_checkpoint else "SELECT 0"
        rows = self._db.execute(f"SELECT at, kind, body, sha256, size FROM events WHERE seq > ({last}) ORDER BY seq")
        for at, kind, body, sha256, size in rows:
            yield LoggedEvent(at, self._event(kind, body, sha256, size))

    def _event(self, kind: str, body: str, sha256: str, size: int) -> Event:
        if kind == "status":
            return StatusSeen(parse(DeviceStatus, body.encode()))
        if kind == "update":
            update, tensors = self._unpack(sha256, Update)
            return UpdateSeen(update, tensors, sha256, size)
        if kind == "refused":
            return UpdateRefused(json.loads(body))
        if kind == "limits":
            return LimitsChanged(parse(Limits, body.encode()))
        if kind == "operator":
            return OperatorActed(parse(Operation, body.encode()))
        if kind == "rest":
            return RestChanged(json.loads(body))
        wall, *working = json.loads(body)
        return ClockTicked(frozenset(working), wall)

    def pending_updates(self) -> dict[str, int]:
        """Number of updates accepted since the last checkpoint, by device."""
        query = (
            "SELECT json_extract(body, '$.device'), count(*) FROM events WHERE kind = 'update' AND seq >"
            " (SELECT coalesce(max(seq), 0) FROM checkpoints) GROUP BY 1 ORDER BY 1"
        )
        return dict(self._db.execute(query).fetchall())

    def paused_and_excluded(self) -> tuple[bool, frozenset[str]]:
        """Whether the operator has paused the run, and the devices that the operator has excluded."""
        last = "SELECT coalesce(max(seq), 0) FROM checkpoints"
        rows = self._db.execute(f"SELECT body FROM events WHERE kind = 'operator' AND seq > ({last}) ORDER BY seq")
        operations = [parse(Operation, body.encode()) for (body,) in rows.fetchall()]
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return after_operations(False, (), operations)
        return after_operations(checkpoint[0].paused_at is not None, checkpoint[0].excluded, operations)

    def limits(self) -> Limits:
        """The limits in force: those of the checkpoint, and what has changed after it."""
        last = "SELECT coalesce(max(seq), 0) FROM checkpoints"
        query = f"SELECT kind, body FROM events WHERE kind IN ('limits', 'operator') AND seq > ({last}) ORDER BY seq"
        checkpoint = self.checkpoint()
        limits = checkpoint[0].limits if checkpoint else Limits.of(self.origin.config)
        for kind, body in self._db.execute(query):
            if kind == "limits":
                limits = parse(Limits, body.encode())
            else:
                limits = after_operation(limits, parse(Operation, body.encode()))
        return limits

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

    def rounds(self, after: int = 0) -> list[ClosedRound]:
        """Records of the closed rounds with a number above `after`."""
        rows = self._db.execute("SELECT record FROM rounds WHERE round > ? ORDER BY round", (after,))
        return [ClosedRound.model_validate_json(record) for (record,) in rows]

    def summaries(self, after: int = 0) -> list[tuple[RoundSummary, float]]:
        """Of the closed rounds with a number above `after`, each with the moment when it was closed (unix seconds)."""
        rows = self._db.execute("SELECT summary, closed_at FROM rounds WHERE round > ? ORDER BY round", (after,))
        return [(RoundSummary.model_validate_json(summary), at) for summary, at in rows]

    def record(self, number: int) -> ClosedRound | None:
        """The record of a closed round; None if there is none."""
        row = self._db.execute("SELECT record FROM rounds WHERE round = ?", (number,)).fetchone()
        return ClosedRound.model_validate_json(row[0]) if row else None

    def closed_counts(self) -> dict[tuple[Stage, bool], int]:
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

    def sizes(self) -> dict[str, int]:
        """Bytes on the disk: of the database, the tensors and all other files."""
        found = {"database": 0, "tensors": 0, "other": 0}
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # it was just removed
                kind = "tensors" if path.parent == self.tensors else "database" if DATABASE in path.name else "other"
                found[kind] += path.stat().st_size if path.is_file() else 0
        return found

    def refusals(self) -> list[RefusalCount]:
        rows = self._db.execute("SELECT device, kind, count, last FROM refusals ORDER BY count DESC, device, kind")
        return [RefusalCount(*row) for row in rows]


def require_folder(folder: Path) -> None:
    """Raises ConfigError if `folder` is a file."""
    if folder.is_file():
        raise ConfigError(f"--out {folder} is a file; pass a folder")


def _to_row(logged: LoggedEvent) -> tuple[float, str, str, str | None, int | None]:
    event = logged.event
    if isinstance(event, StatusSeen):
        return logged.at, "status", event.status.model_dump_json(), None, None
    if isinstance(event, UpdateSeen):
        return logged.at, "update", event.update.model_dump_json(), event.sha256, event.size
    if isinstance(event, UpdateRefused):
        return logged.at, "refused", json.dumps(event.device), None, None
    if isinstance(event, LimitsChanged):
        return logged.at, "limits", event.limits.model_dump_json(), None, None
    if isinstance(event, OperatorActed):
        return logged.at, "operator", event.operation.model_dump_json(), event.operation.sha256 or None, None
    if isinstance(event, RestChanged):
        return logged.at, "rest", json.dumps(event.rests), None, None
    return logged.at, "tick", json.dumps([event.wall, *sorted(event.working)]), None, None


def _write_task(folder: Path, task: Task) -> None:
    """Raises OSError."""
    (folder / TASKS).mkdir(exist_ok=True)
    write_atomically(folder / TASKS / task.sha256, task.blob, durable=True)


def _write_start(folder: Path, start: Start | None) -> None:
    """Raises OSError."""
    if start:
        write_atomically(folder / "tensors" / start.origin.sha256, start.blob, durable=True)
