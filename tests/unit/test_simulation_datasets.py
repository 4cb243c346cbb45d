"""The data of a simulation: folders and tables, real files."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.bundles import Built
from support.samples import CLASSES, write_photos

from edge_runtime.data.samples import Sample
from fedfmsl.errors import ConfigError, InputError
from simulation.datasets import Columns, Dataset, load_folder, load_table

TEST_SHARE = 0.2


def labels(samples: tuple[Sample, ...]) -> list[int]:
    return [sample.label for sample in samples]


def contents(data: Dataset) -> set[tuple[str, int]]:
    return {(sample.sha256, sample.label) for sample in (*data.train, *data.test)}


@pytest.fixture
def table(photos: Path, tmp_path: Path) -> Path:
    """The photos as Hugging Face writes them: structs of bytes and path, integers with names, and a group."""
    files = sorted(photos.rglob("*.jpg"))
    names = sorted(CLASSES, reverse=True)
    rows = pyarrow.table(
        {
            "image": [{"bytes": path.read_bytes(), "path": None} for path in files],
            "label": [names.index(path.parent.name) for path in files],
            "shop": [f"shop-{index % 2}" for index in range(len(files))],
        }
    )
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    path = tmp_path / "photos.parquet"
    pyarrow.parquet.write_table(rows.replace_schema_metadata({"huggingface": json.dumps(info)}), path)
    return path


def test_a_table_has_the_samples_of_its_folder(vit: Built, photos: Path, table: Path) -> None:
    folder = load_folder(photos, vit.bundle, grouped=False, test_share=TEST_SHARE)
    rows = load_table(str(table), vit.bundle, Columns(group="shop"), TEST_SHARE)
    assert contents(rows) == contents(folder)
    assert len(rows.test) == len(folder.test) == 2 * len(CLASSES)
    assert set(rows.train_groups) == {"shop-0", "shop-1"}
    assert set(folder.train_groups) == {""}
    one = rows.train[7]
    (same,) = [sample for sample in (*folder.train, *folder.test) if sample.sha256 == one.sha256]
    assert np.array_equal(rows.inputs.batch([one])["pixels"], folder.inputs.batch([same])["pixels"])


def test_the_files_of_a_split_are_counted_on_and_a_validation_split_is_tested_on(
    vit: Built, table: Path, tmp_path: Path
) -> None:
    rows = pyarrow.parquet.read_table(table)
    whole = load_table(str(table), vit.bundle, Columns(), TEST_SHARE)
    for name, rests in {"train/0.parquet": [0], "train/1.parquet": [1, 2], "validation/0.parquet": [3]}.items():
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        part = rows.take([index for index in range(len(rows)) if index % 4 in rests])
        pyarrow.parquet.write_table(part, tmp_path / "files" / name)
    (tmp_path / "files" / "train" / "._0.parquet").write_bytes(b"what macOS keeps about the file")
    data = load_table(str(tmp_path / "files"), vit.bundle, Columns(), TEST_SHARE)
    assert (len(data.train), len(data.test)) == (30, 10)
    pixels = {each.sha256: whole.inputs.batch([each])["pixels"].tobytes() for each in (*whole.train, *whole.test)}
    assert all(data.inputs.batch([each])["pixels"].tobytes() == pixels[each.sha256] for each in data.train)


def test_group_folders_are_the_natural_groups(vit: Built, tmp_path: Path) -> None:
    for seed, shop in enumerate(("north", "south")):
        write_photos(tmp_path / shop, per_class=5, seed=seed)
    data = load_folder(tmp_path, vit.bundle, grouped=True, test_share=TEST_SHARE)
    assert data.train_groups.count("north") == data.train_groups.count("south") == 4 * len(CLASSES)
    assert all(group in str(sample.path) for sample, group in zip(data.train, data.train_groups, strict=True))


def test_train_and_test_folders_are_no_natural_groups(vit: Built, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_photos(tmp_path / split, per_class=2, seed=0)
    with pytest.raises(InputError, match="expects one folder per group"):
        load_folder(tmp_path, vit.bundle, grouped=True, test_share=TEST_SHARE)


def test_each_content_is_used_once_and_not_in_two_classes(vit: Built, tmp_path: Path) -> None:
    for split, seed in (("train", 0), ("test", 1)):
        write_photos(tmp_path / split, per_class=4, seed=seed)
    shutil.copy(tmp_path / "train" / "apple" / "00.jpg", tmp_path / "train" / "apple" / "copy.jpg")
    shutil.copy(tmp_path / "train" / "apple" / "01.jpg", tmp_path / "test" / "apple" / "copy.jpg")
    shutil.copy(tmp_path / "train" / "apple" / "02.jpg", tmp_path / "train" / "kiwi" / "wrong.jpg")
    data = load_folder(tmp_path, vit.bundle, grouped=False, test_share=TEST_SHARE)
    assert labels(data.train).count(0) == 3
    assert labels(data.train).count(1) == 4
    assert labels(data.test).count(0) == 4
    assert len(contents(data)) == len(data.train) + len(data.test)
    (tmp_path / "train" / "apple" / "torn.jpg").write_bytes(b"no photo")
    data = load_folder(tmp_path, vit.bundle, grouped=False, test_share=TEST_SHARE)
    assert data.coverage == "31 of 36 samples were used, 5 were skipped"


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (Columns(label="kind"), "--label-column kind: no such column; choose from image, label, shop"),
        (Columns(sample="photo"), "--sample-column photo: no such column"),
        (Columns(group="village"), "--group-column village: no such column"),
    ],
)
def test_a_missing_column_is_named(vit: Built, table: Path, columns: Columns, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_table(str(table), vit.bundle, columns, TEST_SHARE)


def test_what_is_not_a_table_is_named(vit: Built, tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_text("no table")
    with pytest.raises(InputError, match=r"data\.parquet cannot be read"):
        load_table(str(tmp_path / "data.parquet"), vit.bundle, Columns(), TEST_SHARE)
    with pytest.raises(InputError, match=r"none\.parquet does not exist"):
        load_table(str(tmp_path / "none.parquet"), vit.bundle, Columns(), TEST_SHARE)
    with pytest.raises(InputError if find_spec("datasets") else ConfigError, match=r"--dataset nobody/nothing is n"):
        load_table("nobody/nothing", vit.bundle, Columns(), TEST_SHARE)


def test_a_saved_dataset_of_hugging_face_has_the_samples_of_its_folder(
    vit: Built, photos: Path, table: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_parquet(str(table)).save_to_disk(str(tmp_path / "saved"))
    rows = load_table(str(tmp_path / "saved"), vit.bundle, Columns(), TEST_SHARE)
    assert contents(rows) == contents(load_folder(photos, vit.bundle, grouped=False, test_share=TEST_SHARE))
