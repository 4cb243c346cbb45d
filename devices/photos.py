"""The trial's photos as folders, as a user would have them: groceries/{train,test}/<class>/…, their own split kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet

from edge_runtime.images import image_files, is_readable
from protocol.errors import InputError
from shell.cli import console

Photos = dict[str, list[Path]]  # class → its images


def unpack_groceries(parquet: Path, folder: Path) -> Path:
    """Writes the photos below `folder`, once. Train and validation photos are from other shop visits than the test's.

    Every test photo stands in the file twice; it is written once, so that no photo is on two devices.
    """
    if folder.is_dir():
        return folder
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    table = pyarrow.parquet.read_table(parquet, columns=["dataset", "finegrained_cat", "image_data"])
    seen: set[bytes] = set()
    for index, row in enumerate(table.to_pylist()):
        if row["image_data"] in seen:
            continue
        seen.add(row["image_data"])
        kind = "test" if row["dataset"] == "test" else "train"
        path = scratch / kind / row["finegrained_cat"] / f"{index:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image_data"])
    scratch.rename(folder)
    return folder


def find_photos(folder: Path, classes: list[str] | None, test_share: float = 0.2) -> tuple[Photos, Photos]:
    """Training and test photos by class, from DIR/{train,test}/<class>/… or DIR/<class>/…, where the last of each class
    in the order of their names are the test photos (neighbours in name are often near-duplicates, which must not leak).
    Unreadable ones are named and left out.

    Raises InputError if a folder is missing or holds no images.
    """
    if not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist")
    presplit = (folder / "train").is_dir() and (folder / "test").is_dir()
    train = _by_class(folder / "train" if presplit else folder, classes)
    if not train:
        raise InputError(f"image folder {folder} holds no images; put them into one subfolder per class")
    if presplit:
        test = _by_class(folder / "test", None)
        return train, {name: test[name] for name in train if name in test}
    test = {}
    for name, paths in train.items():
        kept = max(2, len(paths) - round(test_share * len(paths)))
        train[name], test[name] = paths[:kept], paths[kept:]
    return train, test


def _by_class(folder: Path, classes: list[str] | None) -> Photos:
    names = classes or sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    found = {name: [path for path in image_files(folder / name) if _check(path)] for name in names}
    empty = [name for name, paths in found.items() if not paths]
    if classes and empty:
        raise InputError(f"class {empty[0]!r} has no images in {folder}")
    return {name: paths for name, paths in found.items() if paths}


def _check(path: Path) -> bool:
    readable = is_readable(path)
    if not readable:
        console.print(f"skipped, not a readable image: {path}")
    return readable
