"""The trial's default photos as folders: groceries/{train,test}/<class>/…, with the data set's own test split."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet


def unpack_groceries(parquet: Path, folder: Path) -> Path:
    """Writes the photos below `folder`, once. The test photos are from other shop visits than the rest.

    The file holds every test photo twice. Each is written once, so that no photo goes to two devices.
    """
    if folder.is_dir():
        return folder
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    table = pyarrow.parquet.read_table(parquet, columns=["dataset", "finegrained_cat", "image_data"])
    written: set[bytes] = set()
    for index, row in enumerate(table.to_pylist()):
        if row["image_data"] in written:
            continue
        written.add(row["image_data"])
        split = "test" if row["dataset"] == "test" else "train"
        path = scratch / split / row["finegrained_cat"] / f"{index:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image_data"])
    scratch.rename(folder)
    return folder
