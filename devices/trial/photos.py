"""The trial's photos as folders, as a user would have them: groceries/{train,test}/<class>/…, their own split kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet


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
