"""What a device remembers of its samples: each file's content, so that a file is read once and not at every start, and
each content's slice, so that it never changes. In one SQLite file, which is written before what it says is acted on.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.data.samples import Sample, Split, Splits
from fedfmsl.common.class_folders import FileVersion
from fedfmsl.errors import ConfigError

SCHEMA = """
CREATE TABLE IF NOT EXISTS reading (preprocessing TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    extent INTEGER NOT NULL
) WITHOUT ROWID;
-- contents that are gone stay, for they may come back; `place` is the order in which they were dealt
CREATE TABLE IF NOT EXISTS slices (place INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, slice TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Content:
    """Of a file that was read: `sha256` is empty if it is not a readable sample. `extent` as in `Sample`."""

    sha256: str
    extent: int


class Ledger:
    """To be had from `opened`. Files go by their path below the folder of samples; what of them cannot be kept, because
    the disk is full, is read again next time."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def read_for(self, preprocessing: str) -> None:
        """Forgets all files if they were read for another preprocessing."""
        if self._db.execute("SELECT preprocessing FROM reading").fetchall() != [(preprocessing,)]:
            with _lenient(), self._db:
                self._db.execute("DELETE FROM files")
                self._db.execute("DELETE FROM reading")
                self._db.execute("INSERT INTO reading VALUES (?)", (preprocessing,))

    def content(self, path: str, version: FileVersion) -> Content | None:
        """What was read of this version of a file."""
        row = self._db.execute(
            "SELECT sha256, extent FROM files WHERE path = ? AND size = ? AND mtime_ns = ?",
            (os.fsencode(path), version.size, version.mtime_ns),
        ).fetchone()
        return Content(*row) if row else None

    def keep_contents(self, contents: Iterable[tuple[str, FileVersion, Content]]) -> None:
        rows = [(os.fsencode(path), v.size, v.mtime_ns, c.sha256, c.extent) for path, v, c in contents]
        with _lenient(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)

    def forget(self, paths: Iterable[str]) -> None:
        with _lenient(), self._db:
            self._db.executemany("DELETE FROM files WHERE path = ?", [(os.fsencode(path),) for path in paths])

    def forget_others(self, paths: set[str]) -> None:
        """Forgets every file but these."""
        known = [os.fsdecode(path) for (path,) in self._db.execute("SELECT path FROM files")]
        self.forget(path for path in known if path not in paths)

    def slices(self, contents: set[str]) -> dict[str, Split]:
        """Those of `contents` that have been dealt, in that order."""
        rows = self._db.execute("SELECT sha256, slice FROM slices ORDER BY place")
        return {sha256: Split(part) for sha256, part in rows if sha256 in contents}

    def keep_splits(self, slices: Splits) -> None:
        """Durably, or it fails (see `opened`)."""
        parts: list[tuple[Split, tuple[Sample, ...]]] = [
            (Split.TRAIN, slices.train),
            (Split.HELD_OUT, slices.held_out),
            (Split.TEST, slices.test),
        ]
        with self._db:
            self._db.executemany(
                "INSERT INTO slices (sha256, slice) VALUES (?, ?) ON CONFLICT (sha256) "
                "DO UPDATE SET slice = excluded.slice WHERE slice != excluded.slice",
                [(sample.sha256, part.value) for part, samples in parts for sample in samples],
            )


def _lenient() -> AbstractContextManager[None]:
    return suppress(sqlite3.OperationalError)


@contextmanager
def opened(path: Path) -> Iterator[Ledger]:
    """Raises ConfigError if the file is damaged, OSError if the disk refuses it."""
    try:
        with closing(sqlite3.connect(path)) as db:
            db.executescript(SCHEMA)
            yield Ledger(db)
    except sqlite3.OperationalError as error:  # full, most likely: SQLite's own words for it differ
        raise OSError(errno.ENOSPC, f"{path} cannot be written or read ({error})") from error
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); restore it, or delete it to have everything read and dealt anew"
        ) from error
