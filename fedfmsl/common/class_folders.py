"""Folders of labelled files: one folder per class, with or without a split by the user.

There are two forms: `DIR/<class>/…`, and `DIR/train/<class>/…` with `DIR/test/<class>/…` or `DIR/val/<class>/…` (see
`fedfmsl.common.split_names`). `fedfmsl.common.folder_walk` decides which files are used. Class names are compared in
Unicode's normal form NFC, because macOS writes the accents in file names in another form.
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedfmsl.common.folder_walk import (
    FileVersion,
    SkippedFile,
    files_below,
    has_suffix,
    is_folder,
    is_unused,
    unreadable,
    visible_entries,
    wrong_suffix,
)
from fedfmsl.common.split_names import Role, role_of
from fedfmsl.errors import InputError

CLASSES_NAMED = 8  # classes that a reason lists
NAMED = 3  # folders that an error lists
NO_CLASS = "not in a class folder"
LEADS_BACK = "link into the same folder"
NOT_TRAINED = "validation split beside a test split; move its files to the training folder to use them"
NO_SPLIT = "beside the training folder; move it there if it is a class"
EMPTY = "class folder without a file that can be used"

RENAME = "rename or remove the folder"

Entry = os.DirEntry[str]
Remedy = Callable[[str, int], str]  # for a class that is not in the task, with its number of files to train on


@dataclass(frozen=True, slots=True)
class ClassFile:
    """A file with a class. `name` is its path below the walked folder."""

    path: Path
    name: str
    label: str
    version: FileVersion
    is_test: bool = False  # in the user's own test split


@dataclass(frozen=True)
class Listing:
    """What a walk found. `test`: the name of the folder with the user's own test split; None: there is none.
    `unknown`: classes that are not in the task, and the number of their files, without the test split."""

    files: list[ClassFile]
    skipped: list[SkippedFile]
    test: str | None = None
    unknown: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Splits:
    """The names of the folders that hold class folders; without `train` it is the walked folder itself. `unused`: the
    other folders, and why."""

    train: str = ""
    test: str | None = None
    unused: Mapping[str, str] = field(default_factory=dict)


def walk_classes(
    folder: Path,
    suffixes: Collection[str],
    noun: str,
    classes: Sequence[str] | None = None,
    remedy: Remedy = lambda *_: f"add it to the run, {RENAME}",
) -> Listing:
    """The files in class folders. `noun` names a file in reasons and errors; `suffixes` are in lower case.

    A file with another suffix, outside of a class folder, or in a class that is not in `classes` is skipped. Raises
    InputError if the folder does not exist or cannot be read, or if it is unclear which of its folders are splits.
    """
    skipped: list[SkippedFile] = []
    entries = _entries(folder, noun, skipped, classes or ())
    splits = _splits(folder, noun, entries, classes or ())
    files: list[ClassFile] = []
    unknown: Counter[str] = Counter()
    known = None if classes is None else {normal_name(name): name for name in classes}

    def found_in(name: str) -> list[tuple[str, FileVersion]]:
        found = []
        for file, version in files_below(folder, name, skipped):
            if has_suffix(file, suffixes):
                found.append((file, version))
            else:
                skipped.append(wrong_suffix(folder / file, noun))
        return found

    for name, entry, is_test in _class_level(folder, entries, splits, skipped, classes or ()):
        if not is_folder(entry, follow=True):
            path = folder / name
            skipped.append(SkippedFile(path, NO_CLASS) if has_suffix(name, suffixes) else wrong_suffix(path, noun))
            continue
        found, label = found_in(name), normal_name(entry.name)
        if known is None or label in known:
            spelling = known[label] if known else label
            files += [ClassFile(folder / file, file, spelling, version, is_test) for file, version in found]
            if not found:
                skipped.append(SkippedFile(folder / name, EMPTY, files=0))
        elif found:
            unknown[label] += 0 if is_test else len(found)  # a test folder follows its training folder
            reason = f"{unknown_class(classes or ())}; {remedy(label, unknown[label])}"
            skipped.append(SkippedFile(folder / name, reason, similar(label, classes or ()), len(found)))
    for name, reason in splits.unused.items():
        if count := len(found_in(name)):
            skipped.append(SkippedFile(folder / name, reason, files=count))
    return Listing(files, skipped, splits.test, unknown)


def check_folder(folder: Path, noun: str) -> None:
    """Raises InputError if `folder` does not exist or is a file. `noun`: what it is, or the flag that names it."""
    if folder.is_dir():
        return
    if folder.exists():
        raise InputError(f"{noun} folder {folder} is a file; pass its folder")
    raise InputError(f"{noun} folder {folder} does not exist; create or mount it, or pass another folder")


def folder_classes(folder: Path, noun: str, skipped: list[SkippedFile], classes: Sequence[str] = ()) -> list[str]:
    """The names of the class folders; those of the training folder if there is one. Other folders are added to
    `skipped`. `classes`: those that are known. Raises as `walk_classes` does."""
    entries = _entries(folder, noun, skipped, classes)
    splits = _splits(folder, noun, entries, classes)
    skipped += [SkippedFile(folder / name, reason) for name, reason in splits.unused.items()]
    found = _class_level(folder, entries, splits, skipped, classes)
    names = [entry.name for _, entry, is_test in found if not is_test and is_folder(entry, follow=True)]
    return [*dict.fromkeys(map(normal_name, names))]


def class_folder(folder: Path, noun: str, classes: Sequence[str], label: str) -> Path:
    """The folder that new files of a class belong in. It need not exist. Raises InputError if no folder can have the
    name of the class, or as `walk_classes` does."""
    if "/" in label or is_unused(label):
        raise InputError(f"no folder can have the name of class {label!r}; give classes in a file (--labels)")
    skipped: list[SkippedFile] = []
    splits = _splits(folder, noun, _entries(folder, noun, skipped, classes), classes)
    level = folder / splits.train
    entries = _entries(level, noun, skipped, classes)
    found = (entry.name for entry in entries if is_folder(entry, follow=True) and normal_name(entry.name) == label)
    return level / next(found, label)


def has_splits(folder: Path, noun: str) -> bool:
    """Whether class folders are in a training folder. Raises as `walk_classes` does."""
    return bool(_splits(folder, noun, _entries(folder, noun, [], ()), ()).train)


def subfolders(folder: Path, noun: str, skipped: list[SkippedFile]) -> list[str]:
    """The names of all folders in a folder. What the rules leave out is added to `skipped`. Raises InputError if the
    folder does not exist or cannot be read."""
    return [entry.name for entry in _entries(folder, noun, skipped, ()) if is_folder(entry, follow=True)]


def normal_name(name: str) -> str:
    """The form in which class names are compared. Names of folders are UTF-8 also if the locale is not."""
    with contextlib.suppress(UnicodeError):  # a name that is not from the file system, or a folder's that is not UTF-8
        name = os.fsencode(name).decode()
    return unicodedata.normalize("NFC", name)


def unknown_class(classes: Sequence[str]) -> str:
    """The reason why a file of another class is not used."""
    known = ", ".join(classes[:CLASSES_NAMED]) + (", …" if len(classes) > CLASSES_NAMED else "")
    return f"class not in the task, whose classes are {known}"


def similar(label: str, classes: Sequence[str]) -> str:
    """A hint at a class whose name differs only in case or outer spaces. "": there is none."""
    plain = plain_name(label)
    near = next((name for name in classes if plain_name(name) == plain), None)
    return f"did you mean {near!r}?" if near else ""


def plain_name(name: str) -> str:
    """A name without case and outer spaces. Two classes whose plain names are equal are more likely one."""
    return name.strip().casefold()


def _entries(folder: Path, noun: str, skipped: list[SkippedFile], kept: Collection[str]) -> list[Entry]:
    try:
        check_folder(folder, noun)
        return visible_entries(folder, skipped, kept)
    except OSError as error:
        raise InputError(f"{noun} folder {folder} cannot be read ({error.strerror}); check its permissions") from error


def _splits(folder: Path, noun: str, entries: Sequence[Entry], classes: Collection[str]) -> _Splits:
    """Finds the user's splits by the names of the folders.

    A training folder holds folders. Alone or beside a test folder it is one; among other folders it may also be a
    class, of vehicles for example, if the names of the classes do not say otherwise. A validation folder is the test
    split if there is no other.
    """
    roles: dict[Role | None, list[str]] = {}
    for entry in entries:
        if is_folder(entry, follow=True):
            roles.setdefault(role_of(entry.name), []).append(entry.name)
    others, trains = roles.get(None, []), roles.get(Role.TRAIN, [])
    tests, unused = roles.get(Role.TEST, []), roles.get(Role.VALIDATION, [])
    if not tests:
        tests, unused = unused, []
    if not trains:
        if tests and not others and not {*tests} <= {*classes}:
            raise InputError(
                f"{noun} folder {folder} has {_named(tests)} and no training folder; add {folder / 'train'}, or pass "
                "a folder with one subfolder per class"
            )
        return _Splits()
    if others or not tests:
        known, inner = {*map(normal_name, classes)}, _folders_in(folder / trains[0])
        beside = not known.isdisjoint(map(normal_name, others))  # whether classes are beside the training folder
        if not inner or (known.isdisjoint(inner) and (beside or trains[0] in known)):
            return _Splits()
        if not tests and (beside or (others and not known)):
            raise InputError(
                f"{noun} folder {folder} has {_named(trains)} with folders in it beside {_named(others)}, so it is not "
                f"clear whether it is the training folder; pass {folder / trains[0]}, or rename it"
            )
    for same in (trains, tests):
        if len(same) > 1:
            raise InputError(f"{noun} folder {folder} has {_named(same)}, which mean the same; keep one of them")
    reasons = {**dict.fromkeys(unused, NOT_TRAINED), **dict.fromkeys(others, NO_SPLIT)}
    return _Splits(trains[0], tests[0] if tests else None, reasons)


def _folders_in(folder: Path) -> set[str]:
    """The names of the folders in a folder, in their normal form."""
    try:
        return {normal_name(entry.name) for entry in visible_entries(folder, []) if is_folder(entry, follow=True)}
    except OSError:
        return set()


def _named(names: Sequence[str]) -> str:
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return " and ".join([*(f"{name}/" for name in names[:NAMED]), *more])


def _class_level(
    folder: Path, entries: Sequence[Entry], splits: _Splits, skipped: list[SkippedFile], kept: Collection[str]
) -> Iterator[tuple[str, Entry, bool]]:
    """Class folders and the files beside them: the path below `folder`, and whether it is in the test split."""
    level = [(entry.name, entry, False) for entry in entries if not (splits.train and is_folder(entry, follow=True))]
    for split in filter(None, (splits.train, splits.test)):
        try:
            inner = visible_entries(folder / split, skipped, kept)
        except OSError as error:
            skipped.append(unreadable(folder / split, error))
        else:
            level += [(f"{split}/{entry.name}", entry, split == splits.test) for entry in inner]
    for name, entry, is_test in level:
        if entry.is_symlink() and _leads_back(folder, entry):
            skipped.append(SkippedFile(folder / name, LEADS_BACK))
        else:
            yield name, entry, is_test


def _leads_back(folder: Path, link: Entry) -> bool:
    """Whether a link leads to a folder that contains `folder`, or to a place below it that is read without the link."""
    if not is_folder(link, follow=True):
        return False
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(link.path))
    if not target.is_relative_to(root):
        return root.is_relative_to(target)
    return not any(map(is_unused, target.relative_to(root).parts))
