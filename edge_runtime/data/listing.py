"""Which files below a folder are samples, by their names alone, and of which class.

Three forms are understood: `DIR/<class>/…`; `DIR/train/<class>/…` with `DIR/test/<class>/…`, where the user has split
off a test slice; and any folder with a CSV file of labels (see `edge_runtime.data.labels`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.data.inputs import Kind
from edge_runtime.data.labels import read_labels
from edge_runtime.data.samples import SkippedFile
from fedfmsl.errors import InputError

CLASSES_NAMED = 8
TRAIN, TEST = "train", "test"
IGNORED = frozenset(  # beside hidden ones: what systems and file servers leave in folders
    {"Thumbs.db", "desktop.ini", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)


@dataclass(frozen=True, slots=True)
class Version:
    """Of a file: changes when it is written to."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Version:
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class File:
    """One that has a label. `name` is its path below the folder; `apart`: it lies among those to test on."""

    path: Path
    name: str
    version: Version
    label: int
    apart: bool = False


@dataclass(frozen=True)
class Listing:
    """`split`: the user has split off a test slice."""

    files: list[File]
    skipped: list[SkippedFile]
    split: bool


def list_files(folder: Path, classes: Sequence[str], kind: Kind, labels: Path | None) -> Listing:
    """Raises InputError if the folder is missing or cannot be read, or the file of labels."""
    if not folder.is_dir():
        raise InputError(f"{kind.noun} folder {folder} does not exist")
    try:
        return _by_csv(folder, classes, kind, labels) if labels else _by_folder(folder, classes, kind)
    except OSError as error:
        raise InputError(f"{kind.noun} folder {folder} cannot be read ({error.strerror})") from error


def _by_folder(folder: Path, classes: Sequence[str], kind: Kind) -> Listing:
    listing = Listing([], [], split=(folder / TRAIN).is_dir() and (folder / TEST).is_dir())
    for part in (TRAIN, TEST) if listing.split else ("",):
        for entry in _entries(folder / part):
            name = f"{part}/{entry.name}" if part else entry.name
            if entry.is_dir():
                _add_class(listing, folder, name, classes, kind)
            elif kind.has_name(name):
                listing.skipped.append(SkippedFile(folder / name, "lies in no class's folder"))
    return listing


def _add_class(listing: Listing, folder: Path, name: str, classes: Sequence[str], kind: Kind) -> None:
    part, _, label = name.rpartition("/")
    found = list(_below(folder, name, listing.skipped))
    if label not in classes:
        if any(kind.has_name(file) for file, _ in found):
            listing.skipped.append(
                SkippedFile(folder / name, f"{_unknown(label, classes)}; rename or remove the folder")
            )
        return
    for file, version in found:
        if kind.has_name(file):
            listing.files.append(File(folder / file, file, version, classes.index(label), part == TEST))
        else:
            listing.skipped.append(SkippedFile(folder / file, _foreign(kind)))


def _by_csv(folder: Path, classes: Sequence[str], kind: Kind, source: Path) -> Listing:
    labels, skipped = read_labels(source)
    listing = Listing([], skipped, split=False)
    unlabelled = 0
    for name, version in _below(folder, "", skipped):
        said = labels.pop(name, None)
        if said is None:
            unlabelled += kind.has_name(name)
        elif not kind.has_name(name):
            skipped.append(SkippedFile(folder / name, _foreign(kind)))
        elif len(said) > 1:
            each = " and ".join(f"{label!r} (line {line})" for label, line in said.items())
            skipped.append(SkippedFile(folder / name, f"{source.name} calls it {each}"))
        else:
            ((label, line),) = said.items()
            if label in classes:
                listing.files.append(File(folder / name, name, version, classes.index(label)))
            else:
                skipped.append(SkippedFile(source, f"line {line}: {_unknown(label, classes)}; correct the line"))
    for name, said in labels.items():
        skipped.append(SkippedFile(source, f"line {min(said.values())} names {name}, which is not below {folder}"))
    if unlabelled:
        skipped.append(SkippedFile(folder, f"{unlabelled} {kind.noun}s have no label in {source.name}"))
    listing.files.sort(key=lambda file: classes[file.label])
    return listing


def _below(folder: Path, name: str, skipped: list[SkippedFile]) -> Iterator[tuple[str, Version]]:
    """The files at any depth below `name` in `folder`, in the order of their names. Links to folders are not followed:
    they may lead back."""
    try:
        entries = _entries(folder / name)
    except FileNotFoundError:  # it has just gone
        return
    except OSError as error:
        skipped.append(SkippedFile(folder / name, f"cannot be read ({error.strerror})"))
        return
    for entry in entries:
        path = f"{name}/{entry.name}" if name else entry.name
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from _below(folder, path, skipped)
            elif entry.is_file():
                yield path, Version.of(entry.stat())
        except FileNotFoundError:
            continue


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Those that are not hidden."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in IGNORED]
    return sorted(shown, key=lambda entry: entry.name)


def _unknown(label: str, classes: Sequence[str]) -> str:
    known = ", ".join(classes[:CLASSES_NAMED]) + (", …" if len(classes) > CLASSES_NAMED else "")
    return f"class {label!r} is not of this bundle, which knows {known}"


def _foreign(kind: Kind) -> str:
    return f"its name ends like no {kind.noun}'s ({', '.join(sorted(kind.suffixes))})"
