"""A folder as a stream: every file that lies in it or arrives is classified once, until somebody interrupts."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.inference.classifier import Classifier
from edge_runtime.store import DeviceStore
from edge_runtime.training.model import read_personal_model
from fedfmsl.common.cli import notice
from fedfmsl.errors import InputError
from fedfmsl.protocol.messages import Prediction

LOOK_SECONDS = 1.0
SETTLED_SECONDS = 1.0  # what nobody has written to for so long is whole, most likely
PATIENCE_SECONDS = 10.0  # and what still cannot be read after so long never will be

Stamp = tuple[int, int]  # a file's bytes, and when it was written to, in nanoseconds


@dataclass(frozen=True)
class Arrival:
    """`rested`: seconds for which nobody has written to it, as far as can be told."""

    path: Path
    stamp: Stamp
    rested: float


class Inbox:
    """What of a folder, at any depth, is to be classified now. What is done is remembered as long as it stays."""

    def __init__(self, folder: Path, only_new: bool = False) -> None:
        """With `only_new` what lies in it now is done already. Raises InputError if there is no such folder."""
        if not folder.is_dir():
            raise InputError(f"watched folder {folder} does not exist; make it, or give another")
        self._folder = folder
        self._done: dict[Path, Stamp] = dict(_files(folder)) if only_new else {}
        self._since: dict[Path, tuple[Stamp, float]] = {}  # when its stamp was seen first

    def look(self, suffixes: Collection[str]) -> list[Arrival]:
        """The oldest first. What may still be growing is left for the next look."""
        now = time.monotonic()
        try:
            found = {path: stamp for path, stamp in _files(self._folder) if path.suffix.lower() in suffixes}
        except OSError:  # a disk that was taken out comes back as it was
            return []
        unchanged = {path: since for path, since in self._since.items() if found.get(path) == since[0]}
        self._since = {path: unchanged.get(path, (stamp, now)) for path, stamp in found.items()}
        self._done = {path: stamp for path, stamp in self._done.items() if found.get(path) == stamp}
        arrivals = []
        for path, stamp in sorted(found.items(), key=lambda item: (item[1][1], item[0])):
            rested = max(now - self._since[path][1], time.time() - stamp[1] / 1e9)
            settled = path in unchanged or rested > SETTLED_SECONDS
            if settled and path not in self._done:
                arrivals.append(Arrival(path, stamp, rested))
        return arrivals

    def done(self, arrival: Arrival) -> None:
        self._done[arrival.path] = arrival.stamp


def watched(classifier: Classifier, inbox: Inbox, seconds: float = LOOK_SECONDS) -> Iterator[Prediction | None]:
    """A prediction for each file; None after each look, before it waits for the next. A file that cannot be read is
    named once, and does not end the stream."""
    while True:
        for arrival in inbox.look(classifier.kind.suffixes):
            try:
                yield classifier.classify(arrival.path)
            except InputError as error:
                if not arrival.path.exists():
                    continue
                if arrival.rested < PATIENCE_SECONDS:  # somebody may still be at it
                    continue
                notice(f"skipped: {error}")
            inbox.done(arrival)
        yield None
        time.sleep(seconds)


def wait_for_a_model(store: DeviceStore, seconds: float = LOOK_SECONDS) -> None:
    """Until the device has one; says so if it has none yet."""
    told = False
    while True:
        try:
            read_personal_model(store)
        except InputError as error:
            if not told:
                notice(f"waiting: {error}")
            told = True
            time.sleep(seconds)
        else:
            return


def _files(folder: Path) -> Iterator[tuple[Path, Stamp]]:
    """Hidden files and folders, which is where others keep what is not whole yet, are left out. Raises OSError if the
    folder itself cannot be read."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(Path(entry.path))
                elif entry.is_file():
                    found = entry.stat()
                    yield Path(entry.path), (found.st_size, found.st_mtime_ns)
            except OSError:  # it has gone meanwhile
                continue
