"""Opens the database of a run, RUN/run.sqlite, and says what is in it."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

from fedfmsl.errors import RunError

FORMAT = 2  # of the database; a run of another format is refused
SCHEMA = f"""
PRAGMA user_version = {FORMAT};
CREATE TABLE IF NOT EXISTS run (origin TEXT NOT NULL, ended TEXT);
-- AUTOINCREMENT: a number is never used again, also after the events before a checkpoint were deleted
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL,
    sha256 TEXT, size INTEGER
);
-- where the blobs of updates are
CREATE TABLE IF NOT EXISTS blobs (
    sha256 TEXT PRIMARY KEY, file INTEGER NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoints (
    seq INTEGER PRIMARY KEY, at REAL NOT NULL, state TEXT NOT NULL, sha256 TEXT NOT NULL
);
-- those fields of the state that have an item for each device, in pieces
CREATE TABLE IF NOT EXISTS checkpoint_pieces (
    seq INTEGER NOT NULL, field TEXT NOT NULL, first INTEGER NOT NULL, items TEXT NOT NULL,
    PRIMARY KEY (seq, field, first)
) WITHOUT ROWID;
-- records without the values of devices
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, closed_at REAL NOT NULL, record TEXT NOT NULL, summary TEXT NOT NULL
);
-- what the record of a round has of its devices: header of the update and bytes on the wire; NULL if it is missing
CREATE TABLE IF NOT EXISTS round_devices (
    round INTEGER NOT NULL, device TEXT NOT NULL, answer TEXT, bytes_up INTEGER, PRIMARY KEY (round, device)
) WITHOUT ROWID;
-- closed rounds whose records are deleted: how many of each stage were `repeated` (1) or not (0)
CREATE TABLE IF NOT EXISTS deleted_rounds (
    stage TEXT NOT NULL, repeated INTEGER NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (stage, repeated)
);
CREATE TABLE IF NOT EXISTS refusals (
    device TEXT NOT NULL, kind TEXT NOT NULL, count INTEGER NOT NULL, last TEXT NOT NULL, PRIMARY KEY (device, kind)
);
"""


def open_database(path: Path, busy_seconds: float) -> sqlite3.Connection:
    """A database in a folder that this user may not write to, as a backup, is read as it is: SQLite would make files
    beside it. Raises RunError if it has changes that are in such a file only."""
    if os.access(path.parent, os.W_OK):
        return sqlite3.connect(path, timeout=busy_seconds, isolation_level=None)
    log = path.with_name(f"{path.name}-wal")
    if log.is_file() and log.stat().st_size:
        raise RunError(
            f"this user may not write to {path.parent}, and {log.name} has changes that are not in {path.name} yet; "
            "run the command as the server's user, or on a copy that can be written"
        )
    return sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True, isolation_level=None)


def is_readable(folder: Path) -> bool:
    """Whether this user may read a folder. True if it does not exist."""
    return not folder.exists() or os.access(folder, os.R_OK | os.X_OK)


def check_version(path: Path, origin: str, database: sqlite3.Connection) -> None:
    """Raises RunError for a run of another version: one whose bundle held its class list, or of another FORMAT."""
    stored = json.loads(origin)
    if isinstance(stored, dict) and "sha256" in stored and "task" not in stored:
        raise RunError(
            f"{path} is a run of an earlier version, without a task; export its bundle again with python -m "
            "export.build, and start a new run with another --out"
        )
    (found,) = database.execute("PRAGMA user_version").fetchone()
    if found != FORMAT:
        raise RunError(
            f"{path} is a run of another version (format {found}, this version has format {FORMAT}); go on with the "
            "version that started it, or start a new run with another --out"
        )
