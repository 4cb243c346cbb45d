"""The ledger of a device's samples, one SQLite file. It has the SHA-256 of each file, so that a restart reads no file
again, and the split of each SHA-256, so that it never changes. It also knows which samples are new, and with --rehearse
which ones are kept for it.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path

from edge_runtime.data.samples import Sample, Split, Splits
from fedfmsl.common.class_folders import ClassFile
from fedfmsl.common.folder_walk import SkippedFile
from fedfmsl.errors import ConfigError

ABSENT = 100_000  # contents of deleted files whose splits are kept, of about 150 bytes each
SCHEMA = """
-- how files were read: what they become, and what decides which ones can be read
CREATE TABLE IF NOT EXISTS read_with (preprocessing TEXT NOT NULL, decoders TEXT NOT NULL);
-- `unreadable`: why a file cannot be read; its `sha256` is then empty
CREATE TABLE IF NOT EXISTS file_versions (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    extent INTEGER NOT NULL, unreadable TEXT NOT NULL
) WITHOUT ROWID;
-- contents of deleted files stay, because the files may come back: the latest ABSENT of them; `place` is the order of
-- assignment
CREATE TABLE IF NOT EXISTS slices (place INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, slice TEXT NOT NULL);
-- train samples that a round of stage 1 or 2 of `run` has used
CREATE TABLE IF NOT EXISTS trained (sha256 TEXT PRIMARY KEY, run TEXT NOT NULL) WITHOUT ROWID;
-- train samples of the last round with their classes, with --rehearse: what can be rehearsed when its file is gone
CREATE TABLE IF NOT EXISTS rehearsal (place INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, class TEXT NOT NULL);
"""


class Ledger:
    """Made by `open_ledger`. Files are named by their path below the sample folder. On a full disk new files are not
    stored, and are read again at the next scan."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def set_reading(self, preprocessing: str, decoders: str) -> None:
        """Forgets all files if they were read with another preprocessing. Forgets those that could not be read if other
        decoders have tried."""
        before = self._db.execute("SELECT preprocessing, decoders FROM read_with").fetchall()
        if before != [(preprocessing, decoders)]:
            same = [row[0] for row in before] == [preprocessing]
            with _full_disk_ignored(), self._db:
                self._db.execute("DELETE FROM file_versions" + (" WHERE unreadable != ''" if same else ""))
                self._db.execute("DELETE FROM read_with")
                self._db.execute("INSERT INTO read_with VALUES (?, ?)", (preprocessing, decoders))

    def recall(self, file: ClassFile, label: int) -> Sample | SkippedFile | None:
        """The sample of a file, or why it has none. None if this version of it was not read before."""
        row = self._db.execute(
            "SELECT sha256, extent, unreadable FROM file_versions WHERE path = ? AND size = ? AND mtime_ns = ?",
            (os.fsencode(file.name), file.version.size, file.version.mtime_ns),
        ).fetchone()
        if row and row[2]:
            return SkippedFile(file.path, row[2])
        return Sample(file.path, row[0], label, row[1]) if row else None

    def remember(self, read: Iterable[tuple[ClassFile, Sample | SkippedFile]]) -> None:
        rows = [
            (os.fsencode(file.name), file.version.size, file.version.mtime_ns)
            + (("", 0, found.reason) if isinstance(found, SkippedFile) else (found.sha256, found.extent, ""))
            for file, found in read
        ]
        with _full_disk_ignored(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO file_versions VALUES (?, ?, ?, ?, ?, ?)", rows)

    def forget(self, names: Iterable[str]) -> None:
        with _full_disk_ignored(), self._db:
            self._db.executemany("DELETE FROM file_versions WHERE path = ?", [(os.fsencode(name),) for name in names])

    def forget_others(self, names: set[str]) -> None:
        """Forgets every file but these."""
        known = [os.fsdecode(path) for (path,) in self._db.execute("SELECT path FROM file_versions")]
        self.forget(name for name in known if name not in names)

    def splits(self, contents: set[str]) -> dict[str, Split]:
        """The splits of those `contents` (SHA-256) that have one, in the order of assignment."""
        rows = self._db.execute("SELECT sha256, slice FROM slices ORDER BY place")
        return {sha256: Split(part) for sha256, part in rows if sha256 in contents}

    def keep_splits(self, splits: Splits) -> None:
        """Durable when it returns. Raises OSError (see `open_ledger`) if the disk is full."""
        parts: list[tuple[Split, tuple[Sample, ...]]] = [
            (Split.TRAIN, splits.train),
            (Split.HELD_OUT, splits.held_out),
            (Split.TEST, splits.test),
        ]
        with self._db:
            self._db.executemany(
                "INSERT INTO slices (sha256, slice) VALUES (?, ?) ON CONFLICT (sha256) "
                "DO UPDATE SET slice = excluded.slice WHERE slice != excluded.slice",
                [(sample.sha256, part.value) for part, samples in parts for sample in samples],
            )
            self._forget_absent({sample.sha256 for _, samples in parts for sample in samples})

    def mark_trained(self, contents: Iterable[str], run: str) -> None:
        """Records that a round of `run` has used these train samples. Another run begins with none."""
        with _full_disk_ignored(), self._db:
            self._db.execute("DELETE FROM trained WHERE run != ? OR sha256 NOT IN (SELECT sha256 FROM slices)", (run,))
            self._db.executemany("INSERT OR IGNORE INTO trained VALUES (?, ?)", [(sha256, run) for sha256 in contents])

    def trained(self, run: str) -> set[str]:
        """The SHA-256 of the samples that rounds of `run` have used."""
        return {sha256 for (sha256,) in self._db.execute("SELECT sha256 FROM trained WHERE run = ?", (run,))}

    def keep_for_rehearsal(self, samples: Mapping[str, str]) -> None:
        """Keeps the classes of these samples, by SHA-256, and forgets all others."""
        with _full_disk_ignored(), self._db:
            known = {sha256 for (sha256,) in self._db.execute("SELECT sha256 FROM rehearsal")}
            self._db.executemany(
                "DELETE FROM rehearsal WHERE sha256 = ?", [(sha256,) for sha256 in known - samples.keys()]
            )
            self._db.executemany(
                "INSERT INTO rehearsal (sha256, class) VALUES (?, ?) ON CONFLICT (sha256) DO UPDATE SET class ="
                " excluded.class WHERE class != excluded.class",
                samples.items(),
            )

    def kept_for_rehearsal(self) -> list[tuple[str, str]]:
        """SHA-256 and class of the samples that `keep_for_rehearsal` has kept, the latest first."""
        return self._db.execute("SELECT sha256, class FROM rehearsal ORDER BY place DESC").fetchall()

    def deleted_kept_for_rehearsal(self) -> int:
        """How many of these samples have no file any more."""
        query = "SELECT count(*) FROM rehearsal WHERE sha256 NOT IN (SELECT sha256 FROM file_versions)"
        return int(self._db.execute(query).fetchone()[0])

    def _forget_absent(self, present: set[str]) -> None:
        """Forgets the splits that were assigned first, if more than ABSENT are of contents that are not `present`."""
        (known,) = self._db.execute("SELECT count(*) FROM slices").fetchone()
        if known - len(present) > ABSENT:
            rows = self._db.execute("SELECT place, sha256 FROM slices ORDER BY place")
            absent = [(place,) for place, sha256 in rows if sha256 not in present]
            self._db.executemany("DELETE FROM slices WHERE place = ?", absent[:-ABSENT])


def _full_disk_ignored() -> AbstractContextManager[None]:
    return suppress(sqlite3.OperationalError)


@contextmanager
def open_ledger(path: Path) -> Iterator[Ledger]:
    """Raises ConfigError if the file is damaged, OSError if it cannot be read or written."""
    try:
        with closing(sqlite3.connect(path)) as db:
            db.executescript(SCHEMA)
            yield Ledger(db)
    except sqlite3.OperationalError as error:  # mostly a full disk, which SQLite reports in several ways
        raise OSError(errno.ENOSPC, f"{path} cannot be written or read ({error})") from error
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); restore it, or delete it: all files are then read and assigned again"
        ) from error
