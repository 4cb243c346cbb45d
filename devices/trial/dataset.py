"""A user's folder of images or texts → the files to train and to test on, by class."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.data.inputs import IMAGES, TEXTS, Kind
from fedfmsl.common.cli import console
from fedfmsl.errors import InputError

Files = dict[str, list[Path]]  # class → its files


def kind_of(folder: Path) -> Kind:
    """What most files below `folder` are. Raises InputError if it is missing or holds neither images nor texts."""
    if not folder.is_dir():
        raise InputError(f"folder {folder} does not exist")
    counts = [(len(kind.files(folder)), kind) for kind in (IMAGES, TEXTS)]
    most, kind = max(counts, key=lambda pair: pair[0])
    if not most:
        raise InputError(f"folder {folder} holds no images and no texts (.txt); put them into one subfolder per class")
    return kind


def find_files(folder: Path, kind: Kind, classes: list[str] | None, test_share: float = 0.2) -> tuple[Files, Files]:
    """Training and test files by class, from DIR/{train,test}/<class>/… or DIR/<class>/…, where the last of each class
    in the order of their names are to test on (neighbours in name are often near-duplicates, which must not leak).
    Unreadable ones are named and left out.

    Raises InputError if a class of `classes` has none, or nothing lies in a class's folder.
    """
    presplit = (folder / "train").is_dir() and (folder / "test").is_dir()
    train = _by_class(folder / "train" if presplit else folder, kind, classes)
    if not train:
        raise InputError(f"folder {folder} holds no {kind.noun}s to train on; put them into one subfolder per class")
    if presplit:
        test = _by_class(folder / "test", kind, None)
        return train, {name: test[name] for name in train if name in test}
    test = {}
    for name, paths in train.items():
        kept = max(2, len(paths) - round(test_share * len(paths)))
        train[name], test[name] = paths[:kept], paths[kept:]
    return train, test


def _by_class(folder: Path, kind: Kind, classes: list[str] | None) -> Files:
    names = classes or sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    found = {name: [path for path in kind.files(folder / name) if _check(path, kind)] for name in names}
    empty = [name for name, paths in found.items() if not paths]
    if classes and empty:
        raise InputError(f"class {empty[0]!r} has no {kind.noun}s in {folder}")
    return {name: paths for name, paths in found.items() if paths}


def _check(path: Path, kind: Kind) -> bool:
    readable = kind.is_readable(path)
    if not readable:
        console.print(f"skipped, not a readable {kind.noun}: {path}")
    return readable
