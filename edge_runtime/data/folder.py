"""A folder of samples whose files come and go, and the slices it gives at each look."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edge_runtime.data.features import Report
from edge_runtime.data.inputs import Kind, reader_of
from edge_runtime.data.labels import walk_labelled
from edge_runtime.data.ledger import Content, Ledger, opened
from edge_runtime.data.samples import Sample, Split, Splits, assign_splits
from edge_runtime.store import DeviceStore
from fedfmsl.common.class_folders import ClassFile, FileVersion, Listing, SkippedFile, walk_classes
from fedfmsl.errors import InputError
from fedfmsl.protocol.bundle import Bundle, file_sha256

SETTLE_SECONDS = 2.0  # a file that was changed less than this ago may still be being written
REASONS = 3  # that an error names
UNLIMITED = 2**62
KEPT_AT_ONCE = 100  # files that are read before what they hold is written down
TOO_LARGE = "takes more memory to read than was measured at the start; make it smaller, or start this device again"

Outcome = Sample | SkippedFile | None  # of a look at a file; None: at the next look it may be something


class SampleFolder:
    """What of a folder a device uses. A file is read when it is new, and when it has changed; never because the device
    was started again."""

    def __init__(
        self,
        folder: Path,
        bundle: Bundle,
        store: DeviceStore,
        labels: Path | None = None,
    ) -> None:
        """`labels` is a CSV file. Raises ConfigError or BundleError if what the bundle takes cannot be read here."""
        reader = reader_of(bundle)
        self._folder = folder
        self._classes = bundle.manifest.classes
        self._preprocessing = bundle.manifest.preprocessing.model_dump_json()
        self._kind = reader.kind
        self._extent = reader.extent
        self._store = store
        self._labels = labels
        self._largest = UNLIMITED

    def look(self, patience: float = 0.0, report: Report = lambda *_: None) -> Splits:
        """The folder as it is now, `assign_new_samples` to follow. A file that may still be being written is left for the
        next look; for up to `patience` seconds it is waited for. What the memory plan is made for is the largest sample
        of the first look: larger ones that come later are set aside.

        Raises InputError if there is nothing to train on (now), ConfigError or OSError as `ledger.opened` does.
        """
        listing = self._list()
        if patience and any(_is_young(file.version) for file in listing.files):
            time.sleep(patience)
            listing = self._list()
        with opened(self._store.samples) as ledger:
            ledger.read_for(self._preprocessing)
            outcomes = list(self._outcomes(ledger, listing.files, report))
            kept = ledger.slices({outcome.sha256 for outcome in outcomes if isinstance(outcome, Sample)})
            slices = _dealt(listing, outcomes, self._classes, kept)
            _check(slices, self._folder, self._kind)
            ledger.forget_others({file.name for file in listing.files})  # not when an empty folder waits for its disk
        if self._largest == UNLIMITED:
            self._largest, _ = largest(slices.samples, self._kind)
        return slices

    def forget(self, path: Path) -> None:
        """Has a file read again at the next look: it has changed without a trace in its size and date."""
        with opened(self._store.samples) as ledger:
            ledger.forget([path.relative_to(self._folder).as_posix()])

    def _list(self) -> Listing:
        if self._labels:
            return walk_labelled(self._folder, self._kind, self._labels, self._classes)
        return walk_classes(self._folder, self._kind.suffixes, self._kind.noun, self._classes)

    def _outcomes(self, ledger: Ledger, files: Sequence[ClassFile], report: Report) -> Iterator[Outcome]:
        fresh: list[tuple[str, FileVersion, Content]] = []
        for index, file in enumerate(files, start=1):
            content: Content | SkippedFile | None = ledger.content(file.name, file.version)
            if content is None and not _is_young(file.version):
                content = _read(file, self._kind, self._extent, self._largest)
                if isinstance(content, Content) and content.extent <= self._largest:
                    fresh.append((file.name, file.version, content))
                if len(fresh) == KEPT_AT_ONCE:
                    ledger.keep_contents(fresh)
                    fresh.clear()
                report("looking", index, len(files))
            yield _outcome(file, content, self._classes, self._kind, self._largest)
        ledger.keep_contents(fresh)


def largest(samples: Sequence[Sample], kind: Kind) -> tuple[int, Path]:
    """What a memory plan is made for: the extent and the file of the sample that takes most memory to read. All that
    are ordinary count the same, so that it is not made anew for each that comes."""
    most = max(samples, key=lambda sample: sample.extent)
    return max(most.extent, kind.ordinary), most.path


def scan(folder: Path, classes: Sequence[str], kind: Kind) -> Splits:
    """What a first look gives, without memory of it. Raises InputError if there is nothing to train on."""
    listing = walk_classes(folder, kind.suffixes, kind.noun, classes)
    read = (_read(file, kind, lambda _: 0, UNLIMITED) for file in listing.files)
    outcomes = [
        _outcome(file, content, classes, kind, UNLIMITED) for file, content in zip(listing.files, read, strict=True)
    ]
    slices = _dealt(listing, outcomes, classes, kept={})
    _check(slices, folder, kind)
    return slices


def _is_young(version: FileVersion) -> bool:
    """Unlike with a date in the far future, which cameras give whose clock is wrong."""
    return abs(time.time() - version.mtime_ns / 1e9) < SETTLE_SECONDS


def _read(file: ClassFile, kind: Kind, extent: Callable[[Path], int], largest: int) -> Content | SkippedFile | None:
    """None: it has gone, or was written to in the meantime. One that is too large is not decoded."""
    try:
        size = extent(file.path)
        sha256 = file_sha256(file.path) if size <= largest else ""
        content = Content(sha256 if sha256 and kind.is_readable(file.path) else "", size)
        return content if FileVersion.of(file.path.stat()) == file.version else None
    except FileNotFoundError:
        return None
    except OSError as error:
        return SkippedFile(file.path, f"cannot be read ({error.strerror})")


def _outcome(
    file: ClassFile, content: Content | SkippedFile | None, classes: Sequence[str], kind: Kind, largest: int
) -> Outcome:
    if content is None or isinstance(content, SkippedFile):
        return content
    if content.extent > largest:
        return SkippedFile(file.path, TOO_LARGE)
    if not content.sha256:
        return SkippedFile(file.path, f"not a readable {kind.noun}")
    return Sample(file.path, content.sha256, classes.index(file.label), content.extent)


def _dealt(listing: Listing, outcomes: Sequence[Outcome], classes: Sequence[str], kept: Mapping[str, Split]) -> Splits:
    """Each content once; one under two classes is of none."""
    found: dict[str, list[tuple[Sample, bool]]] = {}  # content → where it lies, and whether that is apart
    skipped = list(listing.skipped)
    for file, outcome in zip(listing.files, outcomes, strict=True):
        if isinstance(outcome, SkippedFile):
            skipped.append(outcome)
        elif outcome is not None:
            found.setdefault(outcome.sha256, []).append((outcome, file.is_test))
    samples, apart = [], []
    for same in found.values():
        others = [next((other for other, _ in same if other.label != sample.label), None) for sample, _ in same]
        for (sample, _), other in zip(same, others, strict=True):
            if other is not None:
                reason = f"the same as {other.path}, of class {classes[other.label]!r}; remove one of them"
                skipped.append(SkippedFile(sample.path, reason))
        if not any(others):
            samples += [sample for sample, is_apart in same if not is_apart][:1]
            apart += [sample for sample, is_apart in same if is_apart][:1]
    apart.sort(key=lambda sample: (classes[sample.label], sample.sha256))
    slices = assign_splits(samples, apart if listing.has_test else None, kept)
    return replace(slices, skipped=(*skipped, *slices.skipped))


def _check(slices: Splits, folder: Path, kind: Kind) -> None:
    if slices.train:
        return
    why: dict[str, str] = {}
    for each in slices.skipped:
        why.setdefault(each.reason, str(each))
    if not why:
        raise InputError(f"{kind.noun} folder {folder} holds no {kind.noun}s; put them into one subfolder per class")
    more = "" if len(why) <= REASONS else "; …"
    raise InputError(
        f"{kind.noun} folder {folder} holds no {kind.noun}s to train on: {'; '.join([*why.values()][:REASONS])}{more}"
    )
