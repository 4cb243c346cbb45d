"""The questions that are asked next, made again when files arrive, change, or are answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.labelling.destination import Destination
from edge_runtime.labelling.order import questions
from edge_runtime.labelling.queue import Queue, WaitingFile, is_gone, version_of
from fedfmsl.common.folder_walk import FileVersion

PLANNED = 24  # questions that one comparison of all waiting files gives
FRESH_SECONDS = 120.0  # after which predictions may be newer than the planned questions


@dataclass(frozen=True)
class Asked:
    """Near-duplicates that get one answer, the least certain one first."""

    files: tuple[WaitingFile, ...]


class Asking:
    """Threads take turns."""

    def __init__(self, queue: Queue, destination: Destination) -> None:
        self._queue = queue
        self._destination = destination
        self._lock = threading.Lock()
        self._planned: list[list[int]] = []
        self._until = 0.0

    def again(self) -> None:
        """The next questions are made anew."""
        self._until = 0.0

    def next(self, count: int) -> list[Asked]:
        """The next `count` questions, or fewer if there are no more."""
        with self._lock:
            asked = list(self._still_waiting())[:count]
            if len(asked) < count or time.monotonic() > self._until:
                self._plan()
                asked = list(self._still_waiting())[:count]
        return asked

    def _plan(self) -> None:
        has_label = self._destination.has_label()
        waiting = self._queue.paths()
        changed = (number for number, path, known in waiting if has_label(path) or _has_changed(path, known))
        self._queue.forget(list(changed))
        numbers, margin, features = self._queue.waiting()
        planned = questions(margin, features, PLANNED)
        self._planned = [[numbers[member] for member in question.members] for question in planned]
        self._until = time.monotonic() + FRESH_SECONDS

    def _still_waiting(self) -> Iterator[Asked]:
        for question in self._planned:
            known = self._queue.get(question)
            files = tuple(file for file in known if not file.answered and version_of(file.path) == file.version)
            if files:
                yield Asked(files)


def _has_changed(path: Path, known: FileVersion) -> bool:
    """Whether a file is gone or another one. One that cannot be reached now keeps its question."""
    found = version_of(path)
    return is_gone(path) if found is None else found != known
