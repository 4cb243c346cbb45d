"""Folders of classes: the export, the trial and the daemon find the same classes and files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.samples import CLASSES, write_photos

from devices.trial.dataset import find_files
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import IMAGES
from export.build import class_names
from fedfmsl.common.class_folders import folder_classes, walk_classes
from fedfmsl.errors import InputError


def walk(folder: Path) -> list[tuple[str, str, bool]]:
    listing = walk_classes(folder, IMAGES.suffixes, IMAGES.noun)
    return [(file.name, file.label, file.is_test) for file in listing.files]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_files_come_in_the_order_of_names_at_every_depth(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.jpg", "b/10.png", "b/deep/1.JPEG", "a/z.bmp", "a.b/c.webp", "b/d.jpg")
    assert [name for name, _, _ in walk(tmp_path)] == [
        *("a/z.bmp", "a.b/c.webp", "b/10.png", "b/2.jpg", "b/d.jpg", "b/deep/1.JPEG")
    ]
    assert folder_classes(tmp_path) == ["a", "a.b", "b"]


def test_train_and_test_are_splits_only_together(tmp_path: Path) -> None:
    touch(tmp_path, "train/kiwi/1.jpg", "train/plum/2.jpg", "test/kiwi/3.jpg")
    assert walk(tmp_path) == [
        ("train/kiwi/1.jpg", "kiwi", False),
        ("train/plum/2.jpg", "plum", False),
        ("test/kiwi/3.jpg", "kiwi", True),
    ]
    assert folder_classes(tmp_path) == ["kiwi", "plum"]
    shutil.rmtree(tmp_path / "test")
    assert walk(tmp_path) == [("train/kiwi/1.jpg", "train", False), ("train/plum/2.jpg", "train", False)]


def test_skipped_files_have_a_reason(tmp_path: Path) -> None:
    touch(tmp_path, "kiwi/1.jpg", "kiwi/movie.mp4", "lime/2.jpg", "notes/a.txt", "lost.jpg", "README.md")
    listing = walk_classes(tmp_path, IMAGES.suffixes, IMAGES.noun, CLASSES)
    assert {os.path.relpath(each.path, tmp_path): each.reason for each in listing.skipped} == {
        "kiwi/movie.mp4": "its name has no image suffix",
        "lime": "class 'lime' is not in the bundle, whose classes are apple, kiwi, lemon, plum; "
        "rename or remove the folder",
        "lost.jpg": "is not in a class folder",
    }


def test_hidden_entries_and_leftovers_of_systems_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "kiwi/1.jpg", "kiwi/._1.jpg", "kiwi/Thumbs.db", ".trash/2.jpg", "@eaDir/3.jpg", "kiwi/.x/4.jpg")
    listing = walk_classes(tmp_path, IMAGES.suffixes, IMAGES.noun)
    assert [file.name for file in listing.files] == ["kiwi/1.jpg"]
    assert listing.skipped == []


@pytest.mark.parametrize(
    ("name", "what"), [("nowhere", "does not exist; create"), ("a file", "is a file; pass its folder")]
)
def test_a_folder_that_cannot_be_read_is_one_clear_error(tmp_path: Path, name: str, what: str) -> None:
    touch(tmp_path, "a file")
    for read in (walk, folder_classes):
        with pytest.raises(InputError, match=f"{name} {what}"):
            read(tmp_path / name)


def test_the_export_the_trial_and_the_daemon_find_the_same(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", 6)
    touch(photos, "kiwi/._00.jpg", "kiwi/notes.txt", ".cache/00.jpg", "lost+found/00.jpg", "README.md")
    (photos / "plum" / "torn.jpg").write_bytes(b"no image")
    for name in ("loop", "plum/loop"):
        (photos / name).symlink_to(tmp_path / "nowhere")
    shutil.copytree(write_photos(photos / "plum" / "deep", 2, ["by hand"], seed=5), photos / "plum" / "more")
    shutil.rmtree(photos / "plum" / "deep")
    split = tmp_path / "split"
    shutil.copytree(photos, split / "train", symlinks=True)
    shutil.copytree(write_photos(tmp_path / "test", 3, seed=7), split / "test")
    for root in (photos, split):
        names = class_names("", root)
        assert names == CLASSES
        train, test = find_files(root, IMAGES)
        assert tuple(train) == CLASSES
        found = {(path, label) for part in (train, test) for label, paths in part.items() for path in paths}
        assert found == {(sample.path, names[sample.label]) for sample in scan_once(root, names, IMAGES).samples}
