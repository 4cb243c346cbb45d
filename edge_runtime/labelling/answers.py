"""Carries out a person's answers, and takes them back: labels, "not in the list", and deletion.

Every answer is in the queue's database before anything moves, and is completed at the next start if the process ends in
between. A file is never overwritten: its new name is reserved first. Deleted files go to the trash, which is bounded.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from edge_runtime.data.labels import add_lines, remove_lines
from edge_runtime.labelling.destination import Destination, reserved
from edge_runtime.labelling.queue import Queue, WaitingFile, version_of
from fedfmsl.common.files import shortened, sync
from fedfmsl.common.folder_walk import FileVersion
from fedfmsl.errors import InputError, no_permission, shown

UNDOABLE = 100  # answers that can be taken back
TRASH_FILES = 200
TRASH_BYTES = 200_000_000
NOT_BACK = "it could not be moved back either, which the next start tries again"
MTIME_NS = 2 * 10**9  # precision of the time of a file on a FAT disk


class Kind(Enum):
    LABEL = "label"
    UNLISTED = "unlisted"  # of no class of the list; the file stays where it is and is not asked about again
    DELETE = "delete"


@dataclass(frozen=True)
class Answered:
    """`files`: how many it is about."""

    kind: Kind
    label: str
    files: int


@dataclass(frozen=True)
class _Move:
    """`source` and `target` are the same if the file stays. `line`: its line in the labels file."""

    source: Path
    target: Path
    version: FileVersion
    line: str | None


class Answers:
    """The answers of one device. One process at a time; its threads take turns."""

    def __init__(self, queue: Queue, destination: Destination, trash: Path) -> None:
        """Completes answers that an earlier process has begun."""
        self._queue = queue
        self._destination = destination
        self._trash = trash
        self._lock = threading.Lock()
        for number, state in self._unfinished():
            with contextlib.suppress(OSError, InputError):  # a full or missing disk: the next start tries again
                (self._complete if state == "begun" else self._take_back)(number)

    def answer(self, numbers: Sequence[int], kind: Kind, label: str = "", is_new: bool = False) -> Answered:
        """Gives the waiting files with these numbers one answer. `label` is the class for Kind.LABEL; `is_new`: it may
        be one that nobody knows yet, which the device then proposes for the run.

        A file that has changed, is gone, or has an answer already is left out. Raises InputError if nothing is left or
        a file cannot be moved; then nothing has changed, unless the text says otherwise.
        """
        if kind is Kind.LABEL:
            self._destination.check_label(label, is_new)
        with self._lock:
            files = [
                file for file in self._queue.get(numbers) if not file.answered and version_of(file.path) == file.version
            ]
            if not files:
                raise InputError("the files of this question have an answer already, or are gone; reload the page")
            with _explained(files[0].path):
                number = self._begin(files, kind, label)
                try:
                    self._complete(number)
                except BaseException:
                    with _explained(files[0].path, NOT_BACK):
                        self._take_back(number)
                    raise
            self._prune()
        return Answered(kind, label, len(files))

    def undo(self) -> Answered:
        """Takes the last answer back. Raises InputError if there is none, or its files are gone."""
        with self._lock:
            last = self._last()
            if last is None:
                raise InputError("there is no answer to undo")
            number, answered = last
            moves = self._moves(number)
            present = sum(_is_there(move) for move in moves)
            with _explained(moves[0].target, "the next start tries again"):
                self._take_back(number)
            if not present:
                raise InputError("the files of the last answer are gone, so it could not be undone")
            return Answered(answered.kind, answered.label, present)

    def undoable(self) -> Answered | None:
        """The answer that `undo` would take back."""
        last = self._last()
        return last[1] if last else None

    def where(self, file: WaitingFile) -> Path:
        """Where a file is now."""
        if not file.answered:
            return file.path
        with self._queue.open() as db:
            row = db.execute(
                "SELECT target FROM moves WHERE file = ? ORDER BY answer DESC LIMIT 1", (file.id,)
            ).fetchone()
        return Path(os.fsdecode(row[0])) if row else file.path

    def _begin(self, files: Sequence[WaitingFile], kind: Kind, label: str) -> int:
        """Reserves the new names and stores the answer."""
        targets: list[tuple[Path, str | None]] = []
        try:
            for file in files:
                targets.append(self._target(file.path, kind, label))
            with self._queue.open() as db:
                insert = "INSERT INTO answers (kind, label, state) VALUES (?, ?, 'begun')"
                number = int(db.execute(insert, (kind.value, label)).lastrowid or 0)
                db.executemany(
                    "INSERT INTO moves VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [
                        (number, file.id, os.fsencode(file.path), os.fsencode(target), *_numbers(file.version), line)
                        for file, (target, line) in zip(files, targets, strict=True)
                    ],
                )
                db.executemany("UPDATE files SET answer = ? WHERE id = ?", [(number, file.id) for file in files])
        except BaseException:
            for file, (target, _) in zip(files, targets, strict=False):
                if target != file.path:
                    target.unlink()
            raise
        return number

    def _target(self, path: Path, kind: Kind, label: str) -> tuple[Path, str | None]:
        if kind is Kind.LABEL:
            return self._destination.reserve(path, label)
        return (reserved(self._trash, path.name) if kind is Kind.DELETE else path), None

    def _complete(self, number: int) -> None:
        """May be called again after it was interrupted. Files that are gone meanwhile get no line."""
        moves = self._moves(number)
        for move in moves:
            _move(move.source, move.target, move.version)
            _release(move)
        self._change_lines(add_lines, [move for move in moves if move.target.exists()])
        self._set_state(number, "done")

    def _take_back(self, number: int) -> None:
        """May be called again after it was interrupted. Files that are not where the answer has put them stay."""
        self._set_state(number, "undoing")
        moves = self._moves(number)
        self._change_lines(remove_lines, moves)
        for move in moves:
            _move_back(move)
        with self._queue.open() as db:
            db.execute("UPDATE files SET answer = NULL WHERE answer = ?", (number,))
            db.execute("UPDATE answers SET state = 'undone' WHERE id = ?", (number,))

    def _change_lines(self, change: Callable[[Path, Sequence[str]], None], moves: Sequence[_Move]) -> None:
        lines = [move.line for move in moves if move.line is not None]
        if self._destination.labels and lines:
            change(self._destination.labels, lines)

    def _moves(self, number: int) -> list[_Move]:
        with self._queue.open() as db:
            rows = db.execute("SELECT source, target, size, mtime_ns, row FROM moves WHERE answer = ?", (number,))
            return [
                _Move(Path(os.fsdecode(source)), Path(os.fsdecode(target)), FileVersion(size, mtime_ns), line)
                for source, target, size, mtime_ns, line in rows
            ]

    def _set_state(self, number: int, state: str) -> None:
        with self._queue.open() as db:
            db.execute("UPDATE answers SET state = ? WHERE id = ?", (state, number))

    def _unfinished(self) -> list[tuple[int, str]]:
        with self._queue.open() as db:
            return db.execute("SELECT id, state FROM answers WHERE state IN ('begun', 'undoing')").fetchall()

    def _last(self) -> tuple[int, Answered] | None:
        with self._queue.open() as db:
            row = db.execute(
                "SELECT id, kind, label, (SELECT count(*) FROM moves WHERE answer = id) FROM answers "
                "WHERE state = 'done' ORDER BY id DESC LIMIT 1"
            ).fetchone()
        return (int(row[0]), Answered(Kind(row[1]), row[2], row[3])) if row else None

    def _prune(self) -> None:
        """Forgets answers that can no longer be undone, and empties the trash down to its bounds."""
        with self._queue.open() as db:
            row = db.execute(
                "SELECT id FROM answers WHERE state = 'done' ORDER BY id DESC LIMIT 1 OFFSET ?", (UNDOABLE,)
            ).fetchone()
            last = row[0] if row else 0
            db.execute(
                "DELETE FROM files WHERE answer IN (SELECT id FROM answers WHERE id <= ? AND kind != ?)",
                (last, Kind.UNLISTED.value),
            )
            db.execute("DELETE FROM answers WHERE id <= ? OR state = 'undone'", (last,))
            db.execute("DELETE FROM moves WHERE answer NOT IN (SELECT id FROM answers)")
            kept = {os.fsdecode(target) for (target,) in db.execute("SELECT target FROM moves")}
        files, used = 0, 0
        for path in sorted(self._trash.glob("*"), key=lambda path: path.stat().st_ctime_ns, reverse=True):
            files, used = files + 1, used + path.stat().st_size
            if files > TRASH_FILES or used > TRASH_BYTES or str(path) not in kept:
                path.unlink(missing_ok=True)


def _numbers(version: FileVersion) -> tuple[int, int]:
    return version.size, version.mtime_ns


def _move(source: Path, target: Path, version: FileVersion) -> None:
    """Moves a file of this version onto its reserved name, also to another disk. Does nothing if `source` is another
    file or gone. Durable. Raises OSError."""
    if source == target or version_of(source) != version:
        return
    try:
        if source.is_symlink():  # a link may lead nowhere from its new place
            raise OSError(errno.EXDEV, "")
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = target.with_name(f".{shortened(target.name)}.{os.getpid()}")
        try:
            shutil.copy2(source, copy)
            sync(copy)
            copy.replace(target)
        except OSError:
            copy.unlink(missing_ok=True)
            raise
        source.unlink()
    for folder in {source.parent, target.parent}:
        sync(folder)


def _move_back(move: _Move) -> None:
    """Leaves a target that has changed. A file that arrived under the old name stays, too."""
    if move.source == move.target:
        return
    found = version_of(move.target)
    if found is None or not _is_there(move):
        _release(move)
    elif version_of(move.source) == move.version:  # copied to another disk, and not removed there
        move.target.unlink()
    else:
        _move(move.target, reserved(move.source.parent, move.source.name), found)


def _release(move: _Move) -> None:
    """Removes a target of which only the name is reserved."""
    found = version_of(move.target)
    if move.source != move.target and found != move.version and found is not None and not found.size:
        move.target.unlink()


def _is_there(move: _Move) -> bool:
    """Whether the file is where the answer has put it. Times of another disk may be less precise."""
    found = version_of(move.target)
    if found is None or found.size != move.version.size:
        return False
    return abs(found.mtime_ns - move.version.mtime_ns) <= MTIME_NS


@contextlib.contextmanager
def _explained(path: Path, outcome: str = "nothing has changed") -> Iterator[None]:
    """OSError as InputError, which says what has become of the answer."""
    try:
        yield
    except PermissionError as error:
        raise InputError(f"{no_permission(error.filename or path, 'change')}; {outcome}") from error
    except OSError as error:
        raise InputError(f"{shown(path)} could not be moved ({error.strerror or error}); {outcome}") from error
