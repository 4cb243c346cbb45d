"""Folders of labelled files, walked the same way by the export, the trial and the daemon.

There are two forms: `DIR/<class>/…`, and `DIR/train/<class>/…` with `DIR/test/<class>/…`. Hidden entries and files
that operating systems create are ignored. Entries are in the order of their names.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfmsl.common.files import shown
from fedfmsl.errors import InputError

TRAIN, TEST = "train", "test"
IGNORED = frozenset(
    {"Thumbs.db", "desktop.ini", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
)
CLASSES_NAMED = 8  # classes that a reason lists


@dataclass(frozen=True, slots=True)
class FileVersion:
    """Changes when the file is written."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileVersion:
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class ClassFile:
    """A file with a class. `name` is its path below the walked folder."""

    path: Path
    name: str
    label: str
    version: FileVersion
    is_test: bool = False  # below DIR/test


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file or folder that is not used, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


@dataclass(frozen=True)
class Listing:
    """What a walk found. `has_test`: the folder has its own test split."""

    files: list[ClassFile]
    skipped: list[SkippedFile]
    has_test: bool = False


def walk_classes(folder: Path, suffixes: Collection[str], noun: str, classes: Sequence[str] | None = None) -> Listing:
    """The files in class folders. `noun` names a file in reasons and errors; `suffixes` are in lower case.

    A file with another suffix, outside of a class folder, or in a class that is not in `classes` is skipped. Raises
    InputError if the folder does not exist or cannot be read.
    """
    listing = Listing([], [], _has_splits(folder))
    for split in _splits(folder):
        for entry in _entries(folder / split, noun):
            name = f"{split}/{entry.name}" if split else entry.name
            if not entry.is_dir():
                if has_suffix(name, suffixes):
                    listing.skipped.append(SkippedFile(folder / name, "is not in a class folder"))
                continue
            found = list(files_below(folder, name, listing.skipped))
            if classes is None or entry.name in classes:
                for file, version in found:
                    if has_suffix(file, suffixes):
                        listing.files.append(ClassFile(folder / file, file, entry.name, version, split == TEST))
                    else:
                        listing.skipped.append(SkippedFile(folder / file, wrong_suffix(noun)))
            elif any(has_suffix(file, suffixes) for file, _ in found):
                reason = f"{unknown_class(entry.name, classes)}; rename or remove the folder"
                listing.skipped.append(SkippedFile(folder / name, reason))
    return listing


def check_folder(folder: Path, noun: str) -> None:
    """Raises InputError if `folder` does not exist or is a file. `noun`: what it is, or the flag that names it."""
    if folder.is_dir():
        return
    if folder.exists():
        raise InputError(f"{noun} folder {folder} is a file; pass its folder")
    raise InputError(f"{noun} folder {folder} does not exist; create or mount it, or pass another folder")


def folder_classes(folder: Path, noun: str = "class") -> list[str]:
    """The names of the class folders; those of DIR/train if DIR has a test split. Raises as `walk_classes` does."""
    return [entry.name for entry in _entries(folder / _splits(folder)[0], noun) if entry.is_dir()]


def files_below(folder: Path, name: str, skipped: list[SkippedFile]) -> Iterator[tuple[str, FileVersion]]:
    """The files at any depth below `folder`/`name`, with their paths below `folder`. A subfolder that cannot be read is
    added to `skipped`. Links to folders are not followed, because they can form a loop."""
    try:
        entries = _visible(folder / name)
    except FileNotFoundError:  # deleted during the walk
        return
    except OSError as error:
        skipped.append(SkippedFile(folder / name, f"cannot be read ({error.strerror})"))
        return
    for entry in entries:
        path = f"{name}/{entry.name}" if name else entry.name
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(folder, path, skipped)
            elif entry.is_file():
                yield path, FileVersion.of(entry.stat())
        except FileNotFoundError:
            continue


def has_suffix(name: str, suffixes: Collection[str]) -> bool:
    return posixpath.splitext(name)[1].lower() in suffixes


def wrong_suffix(noun: str) -> str:
    return f"its name has no {noun} suffix"


def unknown_class(label: str, classes: Sequence[str]) -> str:
    known = ", ".join(classes[:CLASSES_NAMED]) + (", …" if len(classes) > CLASSES_NAMED else "")
    return f"class {label!r} is not in the bundle, whose classes are {known}"


def _has_splits(folder: Path) -> bool:
    return (folder / TRAIN).is_dir() and (folder / TEST).is_dir()


def _splits(folder: Path) -> tuple[str, ...]:
    return (TRAIN, TEST) if _has_splits(folder) else ("",)


def _entries(folder: Path, noun: str) -> list[os.DirEntry[str]]:
    try:
        check_folder(folder, noun)
        return _visible(folder)
    except OSError as error:
        raise InputError(f"{noun} folder {folder} cannot be read ({error.strerror}); check its permissions") from error


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in IGNORED]
    return sorted(visible, key=lambda entry: entry.name)
