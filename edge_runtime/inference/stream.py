"""Classifies the files of a watched folder, each once, until the process is interrupted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.data.inputs import Kind
from edge_runtime.data.unreadable import UnreadableFileError
from edge_runtime.inference.classifier import Classifier
from edge_runtime.store import DeviceStore
from edge_runtime.training.stored_model import read_personal_model
from fedfmsl.common.backoff import Backoff
from fedfmsl.common.class_folders import check_folder
from fedfmsl.common.cli import notice
from fedfmsl.common.folder_walk import FileVersion, SkippedFile, files_below, summarize, wrong_suffix
from fedfmsl.errors import InputError
from fedfmsl.protocol.messages import Prediction

SCAN_SECONDS = 1.0  # between two scans
COMPLETE_SECONDS = 1.0  # a file that is unchanged for this time is probably complete
UNREADABLE_SECONDS = 10.0  # a file that is unchanged for this time and cannot be read is skipped
RETRY = Backoff(first=10.0, longest=300.0)  # of a file that may be read at another time


@dataclass(frozen=True)
class NewFile:
    """`unchanged`: seconds since the last known change."""

    path: Path
    version: FileVersion
    unchanged: float


class WatchedFolder:
    """Finds the new files of a folder, at any depth. Remembers processed files as long as they exist unchanged."""

    def __init__(self, folder: Path, only_new: bool = False, retry: Backoff = RETRY) -> None:
        """With `only_new`, existing files count as processed. Raises InputError if the folder cannot be read."""
        check_folder(folder, "watched")
        try:
            existing = _list_files(folder, [])
        except OSError as error:
            raise InputError(f"watched folder {folder} cannot be read ({error.strerror}); check its mode") from error
        self._folder = folder
        self._processed: dict[Path, FileVersion] = existing if only_new else {}
        self._first_seen: dict[Path, tuple[FileVersion, float]] = {}  # when each version was first seen
        self._retry = retry
        self._failed: dict[Path, tuple[FileVersion, int, float]] = {}  # attempts so far, and when the next one is due
        self._reported: set[str] = set()  # reasons for which files are not used
        self._gone = False

    def scan(self, kind: Kind) -> list[NewFile]:
        """Complete new files of this kind, oldest first. Later scans return files that may still grow.

        Prints each reason for which files are not used, once, and when the folder disappears and is back.
        """
        now = time.monotonic()
        skipped: list[SkippedFile] = []
        try:
            files = _list_files(self._folder, skipped)
        except OSError as error:  # an unmounted disk may come back with the same files
            if not self._gone:
                notice(f"watched folder {self._folder} cannot be read ({error.strerror}); waiting for it")
            self._gone = True
            return []
        if self._gone:
            notice(f"watched folder {self._folder} can be read again")
        self._gone = False
        found = {path: version for path, version in files.items() if kind.has_name(path.name)}
        skipped += [wrong_suffix(path, kind.noun) for path in files if path not in found]
        self._report(skipped)
        unchanged = {path: seen for path, seen in self._first_seen.items() if found.get(path) == seen[0]}
        self._first_seen = {path: unchanged.get(path, (version, now)) for path, version in found.items()}
        self._processed = {path: version for path, version in self._processed.items() if found.get(path) == version}
        self._failed = {path: failed for path, failed in self._failed.items() if found.get(path) == failed[0]}
        new = []
        for path, version in sorted(found.items(), key=lambda item: (item[1].mtime_ns, item[0])):
            seconds = max(now - self._first_seen[path][1], time.time() - version.mtime_ns / 1e9)
            is_complete = path in unchanged or seconds > COMPLETE_SECONDS
            is_due = path not in self._failed or now >= self._failed[path][2]
            if is_complete and is_due and path not in self._processed:
                new.append(NewFile(path, version, seconds))
        return new

    def _report(self, skipped: Sequence[SkippedFile]) -> None:
        new = [each for each in skipped if each.reason not in self._reported]
        for line in summarize(new, self._folder):
            notice(f"skipped: {line}")
        self._reported |= {each.reason for each in new}

    def mark_processed(self, file: NewFile) -> None:
        self._processed[file.path] = file.version

    def postpone(self, file: NewFile) -> bool:
        """A later scan returns the file again. Whether this is the first time for this version of it."""
        _, attempts, _ = self._failed.get(file.path, (None, 0, 0.0))
        self._failed[file.path] = (file.version, attempts + 1, time.monotonic() + self._retry.delay(attempts))
        return not attempts


def classify_new_files(
    classifier: Classifier,
    folder: WatchedFolder,
    seconds: float = SCAN_SECONDS,
    record: Callable[[Path, FileVersion, Prediction], None] = lambda *_: None,
) -> Iterator[Prediction | None]:
    """Yields a prediction for each new file, and None after each scan. Scans every `seconds`. `record` is called with
    each file's path, version and prediction.

    An unreadable file is reported once and skipped. One that may be readable later, as with other permissions or more
    free memory, is tried again.
    """
    while True:
        for file in folder.scan(classifier.kind):
            try:
                prediction = classifier.classify(file.path)
                record(file.path, file.version, prediction)
                yield prediction
            except InputError as error:
                if not file.path.exists():
                    continue
                if file.unchanged < UNREADABLE_SECONDS:  # another process may still write the file
                    continue
                if isinstance(error, UnreadableFileError) and not error.lasting:
                    if folder.postpone(file):
                        notice(f"{error}; trying again later")
                    continue
                notice(f"skipped: {error}")
            folder.mark_processed(file)
        yield None
        time.sleep(seconds)


def wait_for_model(store: DeviceStore, seconds: float = SCAN_SECONDS) -> None:
    """Returns as soon as the device has a personalized model. Prints one notice if it has to wait."""
    has_reported = False
    while True:
        try:
            read_personal_model(store)
        except InputError as error:
            if not has_reported:
                notice(f"waiting: {error}")
            has_reported = True
            time.sleep(seconds)
        else:
            return


def _list_files(folder: Path, skipped: list[SkippedFile]) -> dict[Path, FileVersion]:
    """Raises OSError if the folder itself cannot be read."""
    os.scandir(folder).close()
    return {folder / name: version for name, version in files_below(folder, "", skipped)}
