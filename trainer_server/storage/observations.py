"""What the server sees and the run does not need: the devices' latest statuses and heartbeats, and the server's own.

RUN/observations.sqlite      for the console; written at most once a second, and not synced: a power failure may lose it
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from pydantic import BaseModel, ValidationError

from fedfmsl.protocol.messages import DeviceStatus, Health

DATABASE = "observations.sqlite"
SECONDS = 1.0  # between two writes
SERVER_SECONDS = 5.0  # the same, if nothing has changed
BUSY_SECONDS = 0.2
SCHEMA = """
CREATE TABLE IF NOT EXISTS server (one INTEGER PRIMARY KEY CHECK (one = 1), body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (device TEXT PRIMARY KEY, status TEXT, health TEXT, heard REAL, changed REAL);
"""


class Acted(BaseModel):
    """What an action of the operator has changed, or why it changed nothing. `at`: unix seconds."""

    text: str
    at: float


class ServerView(BaseModel):
    """The server at the moment `seen` (unix seconds). `deadline`: that of the present round, or of the wait for
    devices; None if there is none now. `waits`: what the run waits for, if too few devices can answer. `excluded`:
    devices that the operator has excluded. `acted`: the operator's last action that this server has carried out or
    refused. `adds`: the classes that are added after the present round. `rests`: until when the run rests, outside of
    the hours of --schedule."""

    seen: float
    deadline: float | None = None
    paused: bool = False
    rests: str = ""
    waits: str = ""
    round_timeout: float = 0.0
    excluded: tuple[str, ...] = ()
    acted: Acted | None = None
    adds: tuple[str, ...] = ()


class DeviceView(BaseModel):
    """`heard`: when the last heartbeat came, in unix seconds; 0 if none came."""

    status: DeviceStatus | None = None
    health: Health | None = None
    heard: float = 0.0


class Observations:
    """Writes. A fault of the file is not the run's: what could not be written is written later, and a damaged file is
    begun anew."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / DATABASE
        self._db: sqlite3.Connection | None = None
        self._healths: dict[str, tuple[str, float]] = {}
        self._statuses: dict[str, DeviceStatus] = {}  # as written
        self._latest: Mapping[str, DeviceStatus] = {}  # the same, as `save` got them
        self._server: ServerView | None = None  # as written
        self._next = 0.0

    def heartbeat(self, health: Health, heard: float) -> None:
        self._healths[health.device] = (health.model_dump_json(), heard)

    @property
    def is_due(self) -> bool:
        """Whether the last look at what has changed was SECONDS ago or more."""
        return time.monotonic() >= self._next

    def save(self, server: ServerView, statuses: Mapping[str, DeviceStatus]) -> None:
        """Writes what has changed, if it `is_due`. `statuses` is never changed."""
        if not self.is_due:
            return
        self._next = time.monotonic() + SECONDS
        changed = (
            {name: status for name, status in statuses.items() if self._statuses.get(name) is not status}
            if statuses is not self._latest  # without a look at each of ten thousand devices
            else {}
        )
        if self._is_written(server) and not changed and not self._healths:
            self._latest = statuses
            return
        # the run forgets devices that have been offline for long
        forgotten = len(self._statuses) + len(changed.keys() - self._statuses.keys()) > len(statuses)
        try:
            db = self._open()
            with db:
                db.execute("INSERT OR REPLACE INTO server VALUES (1, ?)", (server.model_dump_json(),))
                db.executemany(
                    "INSERT INTO devices (device, status, changed) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET status ="
                    " excluded.status, changed = excluded.changed",
                    ((name, status.model_dump_json(), server.seen) for name, status in changed.items()),
                )
                db.executemany(
                    "INSERT INTO devices (device, health, heard, changed) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                    " health = excluded.health, heard = excluded.heard, changed = excluded.changed",
                    ((name, *values, server.seen) for name, values in self._healths.items()),
                )
                if forgotten:
                    known = {name for (name,) in db.execute("SELECT device FROM devices")}
                    gone = [(name,) for name in known - statuses.keys()]
                    db.executemany("DELETE FROM devices WHERE device = ?", gone)
        except sqlite3.OperationalError:  # a full disk is logged when an event cannot be stored
            return
        except sqlite3.Error:  # a power failure has damaged it
            self._begin_anew()
            return
        self._server, self._latest = server, statuses
        self._statuses.update(changed)
        if forgotten:
            self._statuses = dict(statuses)
        self._healths.clear()

    def close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()

    def _begin_anew(self) -> None:
        self.close()
        self._db, self._server, self._statuses, self._latest = None, None, {}, {}
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                self._path.with_name(f"{DATABASE}{end}").unlink(missing_ok=True)

    def _is_written(self, server: ServerView) -> bool:
        last = self._server
        return last is not None and server.seen - last.seen < SERVER_SECONDS and _alike(server, last)

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            db = sqlite3.connect(self._path, timeout=BUSY_SECONDS)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")
            db.execute("PRAGMA cache_size = -256")
            db.executescript(SCHEMA)
            self._db = db
        return self._db


def _alike(one: ServerView, other: ServerView) -> bool:
    """Whether they differ in `seen` only, and by less than a second in their deadlines."""
    near = abs((one.deadline or 0.0) - (other.deadline or 0.0)) < 1
    same = {"seen": 0.0, "deadline": None}
    return near and one.model_copy(update=same) == other.model_copy(update=same)


def read_observations(folder: Path, since: float = 0.0) -> tuple[ServerView | None, dict[str, DeviceView]]:
    """The server, and the devices that have changed after `since`, as they were last written; None and {} if the
    run has no such file."""
    path = folder / DATABASE
    if not path.is_file():
        return None, {}
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as db:
            row = db.execute("SELECT body FROM server").fetchone()
            rows = db.execute(
                "SELECT device, status, health, heard FROM devices WHERE changed > ?", (since,)
            ).fetchall()
        server = ServerView.model_validate_json(row[0]) if row else None
        return server, {name: _view(status, health, heard) for name, status, health, heard in rows}
    except (sqlite3.Error, ValidationError):
        return None, {}


def _view(status: str | None, health: str | None, heard: float | None) -> DeviceView:
    return DeviceView(
        status=DeviceStatus.model_validate_json(status) if status else None,
        health=Health.model_validate_json(health) if health else None,
        heard=heard or 0.0,
    )
