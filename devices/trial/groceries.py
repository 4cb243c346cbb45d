"""The trial's default photos as folders: groceries/{train,test}/<class>/…, with the data set's own test split."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet

from devices.trial.assets import ASSETS, PHOTOS, fetch


def groceries() -> Path:
    """The folder of the photos, downloaded and written once. The test photos are from other shop visits than the rest.

    The downloaded file holds every test photo twice. Each is written once, so that no photo goes to two devices.
    """
    folder = ASSETS / "groceries"
    if folder.is_dir():
        return folder
    table = pyarrow.parquet.read_table(fetch(PHOTOS), columns=["dataset", "finegrained_cat", "image_data"])
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
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
