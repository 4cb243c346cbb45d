"""Classifies the files of a watched folder, each once, until the process is interrupted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.data.inputs import Kind
from edge_runtime.inference.classifier import Classifier
from edge_runtime.store import DeviceStore
from edge_runtime.training.model import read_personal_model
from fedfmsl.common.cli import notice
from fedfmsl.common.folder_walk import FileVersion, SkippedFile, files_below, summarize, wrong_suffix
from fedfmsl.errors import InputError
from fedfmsl.protocol.messages import Prediction

SCAN_SECONDS = 1.0  # between two scans
COMPLETE_SECONDS = 1.0  # a file that is unchanged for this time is probably complete
UNREADABLE_SECONDS = 10.0  # a file that is unchanged for this time and cannot be read is skipped


@dataclass(frozen=True)
class NewFile:
    """`unchanged`: seconds since the last known change."""

    path: Path
    version: FileVersion
    unchanged: float


class WatchedFolder:
    """Finds the new files of a folder, at any depth. Remembers processed files as long as they exist unchanged."""

    def __init__(self, folder: Path, only_new: bool = False) -> None:
        """With `only_new`, existing files count as processed. Raises InputError if the folder does not exist."""
        if not folder.is_dir():
            raise InputError(f"watched folder {folder} does not exist; create it or pass another folder")
        self._folder = folder
        self._processed: dict[Path, FileVersion] = _list_files(folder, []) if only_new else {}
        self._first_seen: dict[Path, tuple[FileVersion, float]] = {}  # when each version was first seen
        self._reported: set[str] = set()  # reasons for which files are not used

    def scan(self, kind: Kind) -> list[NewFile]:
        """Complete new files of this kind, oldest first. Later scans return files that may still grow.

        Prints each reason for which files are not used, once.
        """
        now = time.monotonic()
        skipped: list[SkippedFile] = []
        try:
            files = _list_files(self._folder, skipped)
        except OSError:  # an unmounted disk may come back with the same files
            return []
        found = {path: version for path, version in files.items() if kind.has_name(path.name)}
        skipped += [wrong_suffix(path, kind.noun) for path in files if path not in found]
        self._report(skipped)
        unchanged = {path: seen for path, seen in self._first_seen.items() if found.get(path) == seen[0]}
        self._first_seen = {path: unchanged.get(path, (version, now)) for path, version in found.items()}
        self._processed = {path: version for path, version in self._processed.items() if found.get(path) == version}
        new = []
        for path, version in sorted(found.items(), key=lambda item: (item[1].mtime_ns, item[0])):
            seconds = max(now - self._first_seen[path][1], time.time() - version.mtime_ns / 1e9)
            is_complete = path in unchanged or seconds > COMPLETE_SECONDS
            if is_complete and path not in self._processed:
                new.append(NewFile(path, version, seconds))
        return new

    def _report(self, skipped: Sequence[SkippedFile]) -> None:
        new = [each for each in skipped if each.reason not in self._reported]
        for line in summarize(new, self._folder):
            notice(f"skipped: {line}")
        self._reported |= {each.reason for each in new}

    def mark_processed(self, file: NewFile) -> None:
        self._processed[file.path] = file.version


def classify_new_files(
    classifier: Classifier, folder: WatchedFolder, seconds: float = SCAN_SECONDS
) -> Iterator[Prediction | None]:
    """Yields a prediction for each new file, and None after each scan. Scans every `seconds`.

    An unreadable file is reported once and skipped.
    """
    while True:
        for file in folder.scan(classifier.kind):
            try:
                yield classifier.classify(file.path)
            except InputError as error:
                if not file.path.exists():
                    continue
                if file.unchanged < UNREADABLE_SECONDS:  # another process may still write the file
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
