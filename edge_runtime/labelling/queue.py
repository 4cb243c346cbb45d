"""The files that wait for an answer, with what the model says about them: one SQLite file in the state directory.

The process that classifies the watched folder writes it, the page reads it. A file is identified by a number that is
never used again, so an answer to an old page cannot reach another file of the same name.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.labelling.order import margins
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.common.folder_walk import FileVersion
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import Prediction

MOST = 10_000  # waiting files that are compared, the least certain ones
GUESSES = 3  # most probable classes that are stored
WAIT_SECONDS = 30.0  # for another process that writes
SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
-- `answer`: NULL while the file waits; `feature`: float16
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY AUTOINCREMENT, path BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    time REAL NOT NULL, round INTEGER NOT NULL, label TEXT NOT NULL, guesses TEXT NOT NULL, margin REAL NOT NULL,
    feature BLOB NOT NULL, answer INTEGER
);
CREATE INDEX IF NOT EXISTS waiting ON files (answer, margin, round);
CREATE INDEX IF NOT EXISTS newest ON files (time);
-- `state`: begun, done, undoing or undone; see `edge_runtime.labelling.answers`
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, label TEXT NOT NULL, state TEXT NOT NULL
);
-- what an answer does to a file; `row`: its line in the labels file, or NULL
CREATE TABLE IF NOT EXISTS moves (
    answer INTEGER NOT NULL, file INTEGER NOT NULL, source BLOB NOT NULL, target BLOB NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, row TEXT
);
CREATE INDEX IF NOT EXISTS of_answer ON moves (answer);
"""


@dataclass(frozen=True)
class WaitingFile:
    """A classified file. `label`: a class or `unknown`; `guesses`: the most probable classes and their probabilities;
    `time`: unix seconds; `answered`: whether somebody has answered."""

    id: int
    path: Path
    version: FileVersion
    time: float
    round: int
    label: str
    guesses: tuple[tuple[str, float], ...]
    answered: bool


def version_of(path: Path) -> FileVersion | None:
    """None: there is no such file, or it cannot be reached."""
    try:
        return FileVersion.of(path.stat())
    except OSError:
        return None


def is_gone(path: Path) -> bool:
    """Whether a file was removed. Not if its folder is gone: its disk may come back."""
    try:
        path.stat()
    except FileNotFoundError:
        return path.parent.is_dir()
    except OSError:
        pass
    return False


class Queue:
    """May be used by several processes and threads. Raises ConfigError if the file is damaged, OSError if the disk is
    full or cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.open() as db:
            db.executescript(SCHEMA)

    @contextlib.contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """A connection; what is written is durable when it closes without an error."""
        try:
            with closing(sqlite3.connect(self._path, timeout=WAIT_SECONDS)) as db:
                db.execute("PRAGMA synchronous = FULL")
                with db:
                    yield db
        except sqlite3.OperationalError as error:
            raise OSError(f"{self._path} cannot be written or read ({error})") from error
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{self._path} is damaged ({error}); delete it: files are then asked about again"
            ) from error

    def describe(self, classes: Sequence[str], noun: str) -> None:
        """Stores what the page shows: the classes, and what a file is."""
        with self.open() as db:
            rows = [("classes", json.dumps(list(classes))), ("noun", noun)]
            db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", rows)

    @property
    def classes(self) -> tuple[str, ...]:
        """Empty before the first model."""
        return tuple(json.loads(self._about("classes") or "[]"))

    @property
    def noun(self) -> str:
        return self._about("noun") or "image"

    def put(self, path: Path, version: FileVersion, prediction: Prediction, feature: Vector) -> None:
        """Stores a prediction, and the feature (F,). A file with the same path and version keeps its number and its
        answer."""
        best = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:GUESSES]
        margin = float(margins(np.array([list(prediction.probabilities.values())], np.float32))[0])
        name, half = os.fsencode(path), feature.astype(np.float16).tobytes()
        said = (prediction.time, prediction.round, prediction.label, json.dumps(best), margin, half)
        with self.open() as db:
            db.execute(
                "DELETE FROM files WHERE path = ? AND (size != ? OR mtime_ns != ?)",
                (name, version.size, version.mtime_ns),
            )
            db.execute(
                "INSERT INTO files (path, size, mtime_ns, time, round, label, guesses, margin, feature) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET time = excluded.time, "
                "round = excluded.round, label = excluded.label, guesses = excluded.guesses, margin = excluded.margin, "
                "feature = excluded.feature",
                (name, version.size, version.mtime_ns, *said),
            )

    def feature_of(self, path: Path, version: FileVersion) -> Vector | None:
        """The stored feature of this version of a file."""
        with self.open() as db:
            row = db.execute(
                "SELECT feature FROM files WHERE path = ? AND size = ? AND mtime_ns = ?",
                (os.fsencode(path), version.size, version.mtime_ns),
            ).fetchone()
        return np.frombuffer(row[0], np.float16).astype(np.float32) if row else None

    def of_another_round(self, round_: int) -> tuple[int, Path] | None:
        """The least certain waiting file whose prediction is of another round. None: there is none."""
        with self.open() as db:
            row = db.execute(
                "SELECT id, path FROM files WHERE answer IS NULL AND round != ? ORDER BY margin LIMIT 1", (round_,)
            ).fetchone()
        return (row[0], Path(os.fsdecode(row[1]))) if row else None

    def waiting_after(self, number: int, count: int) -> list[tuple[int, Path]]:
        """The next `count` waiting files with a higher number."""
        with self.open() as db:
            rows = db.execute(
                "SELECT id, path FROM files NOT INDEXED WHERE id > ? AND answer IS NULL ORDER BY id LIMIT ?",
                (number, count),
            ).fetchall()
        return [(row[0], Path(os.fsdecode(row[1]))) for row in rows]

    def waiting(self) -> tuple[list[int], Floats, NDArray[np.float16]]:
        """Numbers, margins (n,) and features (n, F) of the MOST least certain waiting files. A feature of another
        backbone is zero."""
        with self.open() as db:
            rows = db.execute(
                "SELECT id, margin, feature FROM files WHERE answer IS NULL ORDER BY margin, id LIMIT ?", (MOST,)
            )
            numbers, margin, features = [], [], bytearray()
            length = db.execute("SELECT length(feature) FROM files ORDER BY time DESC LIMIT 1").fetchone()
            for number, each, feature in rows:
                numbers.append(number)
                margin.append(each)
                features += feature if len(feature) == length[0] else bytes(length[0])
        table = np.frombuffer(features, np.float16).reshape(len(numbers), -1 if numbers else 0)
        return numbers, np.array(margin, np.float32), table

    def recent(self, count: int) -> list[WaitingFile]:
        """The files that were classified last, the newest first."""
        return self._files("ORDER BY time DESC, id DESC LIMIT ?", (count,))

    def get(self, numbers: Sequence[int]) -> list[WaitingFile]:
        """The files with these numbers that are known, in this order."""
        possible = tuple(number for number in numbers if abs(number) < 2**63)  # SQLite has no others
        marks = ",".join("?" * len(possible))
        found = {file.id: file for file in self._files(f"WHERE id IN ({marks})", possible)}
        return [found[number] for number in numbers if number in found]

    def forget(self, numbers: Sequence[int]) -> None:
        """Forgets waiting files: they are gone, or have a class."""
        with self.open() as db:
            db.executemany("DELETE FROM files WHERE id = ? AND answer IS NULL", [(number,) for number in numbers])

    def paths(self) -> list[tuple[int, Path, FileVersion]]:
        """Every waiting file."""
        with self.open() as db:
            rows = db.execute("SELECT id, path, size, mtime_ns FROM files WHERE answer IS NULL").fetchall()
        return [(row[0], Path(os.fsdecode(row[1])), FileVersion(row[2], row[3])) for row in rows]

    def count(self) -> int:
        """The number of waiting files."""
        with self.open() as db:
            (number,) = db.execute("SELECT count(*) FROM files WHERE answer IS NULL").fetchone()
        return int(number)

    def _about(self, name: str) -> str | None:
        with self.open() as db:
            row = db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def _files(self, where: str, values: tuple[int, ...]) -> list[WaitingFile]:
        with self.open() as db:
            rows = db.execute(
                f"SELECT id, path, size, mtime_ns, time, round, label, guesses, answer FROM files {where}", values
            ).fetchall()
        return [
            WaitingFile(
                id=row[0],
                path=Path(os.fsdecode(row[1])),
                version=FileVersion(row[2], row[3]),
                time=row[4],
                round=row[5],
                label=row[6],
                guesses=tuple((name, float(p)) for name, p in json.loads(row[7])),
                answered=row[8] is not None,
            )
            for row in rows
        ]
