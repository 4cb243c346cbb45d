"""The sample folder. Each scan returns the splits of the files that are in it at that time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.features import Report
from edge_runtime.data.images import decoders
from edge_runtime.data.inputs import DECODING, Kind, Reader, reader_of
from edge_runtime.data.labels import walk_labelled
from edge_runtime.data.ledger import Ledger, open_ledger
from edge_runtime.data.proposals import NothingToTrainError, proposed_classes, remedy_of_unknown
from edge_runtime.data.sample_reader import SampleReader
from edge_runtime.data.samples import Sample, Split, Splits, assign_splits
from edge_runtime.data.unreadable import UnreadableError
from edge_runtime.store import DeviceStore
from fedfmsl.common.class_folders import RENAME, ClassFile, Listing, walk_classes
from fedfmsl.common.folder_walk import SkippedFile, summarize, unreadable
from fedfmsl.protocol.task_bundle import TaskBundle

WRITE_SECONDS = 2.0  # after its last change, a file may still be written
REASONS = 3  # reasons that an error lists
UNLIMITED = 2**62  # an extent
REMEMBERED_AT_ONCE = 100  # files that one transaction stores
IN_TWO_CLASSES = "the same content is in another class; remove one of the two"
# Why a file is too large: at the first scan, and for the memory plan.
TOO_MUCH = "more than half of the device's memory limit; make it smaller, or raise --memory"
UNPLANNED = "more than the device has planned; make it smaller, or restart the device"

# The result of reading a file. None: another process may still write the file; the next scan reads it.
FileResult = Sample | SkippedFile | None


class SampleFolder:
    """The samples in a folder. A file is read when it is new or has changed, and not again after a restart."""

    def __init__(
        self,
        folder: Path,
        bundle: TaskBundle,
        store: DeviceStore,
        labels: Path | None = None,
        reader: SampleReader | None = None,
        most: int = UNLIMITED,
        run: str = "",
        proposes: bool = True,
    ) -> None:
        """`labels` is a CSV file (see `edge_runtime.data.labels`). `reader` is shared with the feature cache; default:
        a new one. A file that takes more than `most` bytes of memory to read is skipped. `run`: whose rounds
        make samples old. `proposes`: whether new classes are proposed. Raises ConfigError or BundleError as `reader_of`
        does."""
        self.path = folder
        self._classes = {name: label for label, name in enumerate(bundle.classes)}
        self._preprocessing = f"{bundle.manifest.preprocessing.model_dump_json()} {DECODING}"
        self._store = store
        self._reader = reader or SampleReader(reader_of(bundle))
        self._labels = labels
        self._most = most
        self._run = run
        self._proposes = proposes
        self._largest: int | None = None  # extent of the largest sample that the memory plan covers

    def scan(self, wait: float = 0.0, report: Report = lambda *_: None) -> Splits:
        """The folder's samples; `assign_new_samples` has to follow.

        A file that changed less than WRITE_SECONDS ago is left for the next scan. If there is one, waits `wait` seconds
        first. The largest sample of the first scan decides the memory plan: later ones that need more memory are
        skipped.

        Raises NothingToTrainError if there is nothing to train on, ConfigError or OSError as `open_ledger` does.
        """
        listing = self._walk()
        if wait and any(_is_recent(file) for file in listing.files):
            time.sleep(wait)
            listing = self._walk()
        with open_ledger(self._store.samples) as ledger:
            ledger.set_reading(self._preprocessing, decoders())
            results = list(self._results(ledger, listing.files, report))
            kept = ledger.splits({result.sha256 for result in results if isinstance(result, Sample)})
            splits = _assign(listing, results, tuple(self._classes), kept)
            if self._proposes:
                splits = replace(splits, proposed=proposed_classes(listing.unknown, tuple(self._classes)))
            _require_training_samples(splits, self.path, self._reader.kind)
            used = ledger.trained(self._run)
            ledger.forget_others({file.name for file in listing.files})  # after the check: an unmounted disk is empty
        if self._largest is None:
            self._largest, _ = largest(splits.samples, self._reader.kind)
        return replace(splits, new=sum(sample.sha256 not in used for sample in splits.train))

    def forget(self, path: Path) -> None:
        """Makes the next scan read a file again. It changed but kept its size and date."""
        with open_ledger(self._store.samples) as ledger:
            ledger.forget([path.relative_to(self.path).as_posix()])

    def _walk(self) -> Listing:
        kind, classes = self._reader.kind, tuple(self._classes)
        if self._labels:
            return walk_labelled(self.path, kind, self._labels, classes)
        return _walk_classes(self.path, kind, classes)

    def _results(self, ledger: Ledger, files: Sequence[ClassFile], report: Report) -> Iterator[FileResult]:
        fresh: list[tuple[ClassFile, Sample | SkippedFile]] = []
        limit = self._most if self._largest is None else self._largest
        for index, file in enumerate(files, start=1):
            label = self._classes[file.label]
            found: FileResult = ledger.recall(file, label)
            if found is None and not _is_recent(file):
                found, lasts = _read(self._reader, file, label, limit)
                if found is not None and lasts:
                    fresh.append((file, found))
                if len(fresh) == REMEMBERED_AT_ONCE:
                    ledger.remember(fresh)
                    fresh.clear()
                report("scanning", index, len(files))
            if isinstance(found, Sample) and found.extent > limit:
                need = f"needs {max(found.extent / 1e6, 1):.0f} MB of memory to read"
                found = SkippedFile(found.path, f"{need}, {TOO_MUCH if self._largest is None else UNPLANNED}")
            yield found
        ledger.remember(fresh)


def largest(samples: Sequence[Sample], kind: Kind) -> tuple[int, Path]:
    """The extent and the file of the sample that takes most memory to read. The extent is at least `kind.ordinary`, so
    that a new ordinary sample does not require a new memory plan."""
    most = max(samples, key=lambda sample: sample.extent)
    return max(most.extent, kind.ordinary), most.path


def scan_once(folder: Path, classes: Sequence[str], kind: Kind) -> Splits:
    """The first scan of a folder, without a ledger. Raises NothingToTrainError if there is nothing to train on."""
    listing = _walk_classes(folder, kind, classes)

    def check(data: bytes) -> NDArray[np.uint8]:
        kind.check(data)
        return np.empty(0, np.uint8)

    reader = SampleReader(Reader(kind, "", check, lambda file, size: 0))
    results = [_read(reader, file, classes.index(file.label), UNLIMITED)[0] for file in listing.files]
    splits = _assign(listing, results, classes, kept={})
    _require_training_samples(splits, folder, kind)
    return splits


def _walk_classes(folder: Path, kind: Kind, classes: Sequence[str]) -> Listing:
    return walk_classes(folder, kind.suffixes, kind.noun, classes, partial(remedy_of_unknown, classes, RENAME))


def _is_recent(file: ClassFile) -> bool:
    """False for dates in the future, which cameras with a wrong clock give."""
    return abs(time.time() - file.version.mtime_ns / 1e9) < WRITE_SECONDS


def _read(reader: SampleReader, file: ClassFile, label: int, largest: int) -> tuple[FileResult, bool]:
    """The result, and whether it lasts until the file changes."""
    try:
        found = reader.read(file, label, largest)
    except FileNotFoundError:
        return None, False
    except OSError as error:
        return unreadable(file.path, error), False
    except UnreadableError as error:
        return SkippedFile(file.path, reader.kind.not_readable(error.reason)), error.lasting
    return found, found is not None and found.extent <= largest


def _assign(
    listing: Listing, results: Sequence[FileResult], classes: Sequence[str], kept: Mapping[str, Split]
) -> Splits:
    """Each content is used once; a content in two classes is skipped."""
    found: dict[str, list[tuple[Sample, bool]]] = {}  # content → its files, and whether each is in the test folder
    skipped = list(listing.skipped)
    for file, result in zip(listing.files, results, strict=True):
        if isinstance(result, SkippedFile):
            skipped.append(result)
        elif result is not None:
            found.setdefault(result.sha256, []).append((result, file.is_test))
    samples, tests = [], []
    for same in found.values():
        others = [next((other for other, _ in same if other.label != sample.label), None) for sample, _ in same]
        for (sample, _), other in zip(same, others, strict=True):
            if other is not None:
                where = f"{other.path}, of class {classes[other.label]!r}"
                skipped.append(SkippedFile(sample.path, IN_TWO_CLASSES, where))
        if not any(others):
            samples += [sample for sample, is_test in same if not is_test][:1]
            tests += [sample for sample, is_test in same if is_test][:1]
    tests.sort(key=lambda sample: (classes[sample.label], sample.sha256))
    splits = assign_splits(samples, None if listing.test is None else tests, kept)
    return replace(splits, skipped=(*skipped, *splits.skipped))


def _require_training_samples(splits: Splits, folder: Path, kind: Kind) -> None:
    if splits.train:
        return
    reasons = summarize((each for each in splits.skipped if not each.is_leftover), folder)
    if not reasons:
        text = f"{kind.noun} folder {folder} holds no {kind.noun}s; put them into one subfolder per class"
        raise NothingToTrainError(text, splits.proposed)
    examples = "; ".join(reasons[:REASONS]) + ("; …" if len(reasons) > REASONS else "")
    text = f"{kind.noun} folder {folder} holds no {kind.noun}s to train on: {examples}"
    raise NothingToTrainError(text, splits.proposed)
