"""Folders of images or texts, as users have them, and their splits."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.samples import CLASSES, write_photos

from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import IMAGES, TEXTS, reader_for
from edge_runtime.data.samples import Splits, assign_new_samples, labels_of
from fedfmsl.errors import InputError
from fedfmsl.protocol.bundle import ImagePreprocessing

PREPROCESSING = ImagePreprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    return shutil.copytree(photos, tmp_path / "photos")


def split(folder: Path) -> Path:
    """The photos as a user would have split them, the first three of each class for the test."""
    for name in CLASSES:
        for index, path in enumerate(sorted((folder / name).iterdir())):
            target = folder / ("test" if index < 3 else "train") / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        (folder / name).rmdir()
    return folder


def contents(splits: Splits) -> list[list[tuple[str, int]]]:
    return [[(i.sha256, i.label) for i in part] for part in (splits.train, splits.held_out, splits.test)]


def test_a_flat_folder_is_split_per_class_without_overlap(folder: Path) -> None:
    splits = scan_once(folder, CLASSES, IMAGES)
    assert [np.bincount(labels_of(s)).tolist() for s in (splits.train, splits.held_out, splits.test)] == [
        [6] * 4,
        [2] * 4,
        [2] * 4,
    ]
    images = [*splits.train, *splits.held_out, *splits.test]
    assert {i.path for i in images} == set(folder.rglob("*.jpg"))
    assert all(i.path.parent.name == CLASSES[i.label] for i in images)
    assert all(hashlib.sha256(i.path.read_bytes()).hexdigest() == i.sha256 for i in images)
    assert splits.class_counts(5).tolist() == [8, 8, 8, 8, 0]


def test_a_folder_with_train_and_test_keeps_the_users_test_split(folder: Path) -> None:
    splits = scan_once(split(folder), CLASSES, IMAGES)
    assert {i.path for i in splits.test} == set((folder / "test").rglob("*.jpg"))
    assert np.bincount(labels_of(splits.train)).tolist() == [6] * 4
    assert np.bincount(labels_of(splits.held_out)).tolist() == [1] * 4


@pytest.mark.parametrize("presplit", [True, False])
def test_splits_are_the_same_under_other_names_and_dates(folder: Path, presplit: bool) -> None:
    root = split(folder) if presplit else folder
    before = contents(scan_once(root, CLASSES, IMAGES))
    for index, path in enumerate(sorted(root.rglob("*.jpg"), reverse=True)):
        path.rename(path.with_name(f"renamed-{index}.JPEG"))
    assert contents(scan_once(root, CLASSES, IMAGES)) == before


def test_labels_follow_the_bundles_order_of_classes(folder: Path) -> None:
    splits = scan_once(folder, ("plum", "x", "lemon", "kiwi", "apple"), IMAGES)
    assert {(i.path.parent.name, i.label) for i in splits.train} == {
        ("plum", 0),
        ("lemon", 2),
        ("kiwi", 3),
        ("apple", 4),
    }


@pytest.mark.parametrize(("count", "sizes"), [(2, [1, 1, 0]), (3, [1, 1, 1]), (4, [2, 1, 1])])
def test_small_classes_still_train_and_hold_out(tmp_path: Path, count: int, sizes: list[int]) -> None:
    splits = scan_once(write_photos(tmp_path, count), CLASSES, IMAGES)
    assert [len(part) for part in (splits.train, splits.held_out, splits.test)] == [4 * size for size in sizes]


def reasons(splits: Splits, folder: Path) -> dict[str, str]:
    return {each.path.relative_to(folder).as_posix(): each.reason for each in splits.skipped}


def keep_one_of(folder: Path) -> Path:
    kept, *others = sorted(folder.iterdir())
    for path in others:
        path.unlink()
    return kept


def test_a_class_with_one_image_is_skipped_until_there_are_two(folder: Path) -> None:
    only = keep_one_of(folder / "kiwi")
    splits = scan_once(folder, CLASSES, IMAGES)
    assert splits.class_counts(4).tolist() == [8, 0, 8, 8]
    (reason,) = reasons(splits, folder).values()
    assert {each.path for each in splits.skipped} == {only}
    assert "needs at least two" in reason


def test_a_folder_in_which_every_class_has_one_image_is_refused(folder: Path) -> None:
    for name in CLASSES:
        keep_one_of(folder / name)
    with pytest.raises(InputError, match=r"no images to train on: 4 files: .*at least two.*apple"):
        scan_once(folder, CLASSES, IMAGES)


def test_an_image_that_exists_twice_counts_once(folder: Path) -> None:
    before = contents(scan_once(folder, CLASSES, IMAGES))
    for path in list((folder / "kiwi").iterdir()):
        shutil.copyfile(path, path.with_name(f"copy of {path.name}"))
    assert contents(scan_once(folder, CLASSES, IMAGES)) == before


def test_a_class_that_is_not_in_the_bundle_is_skipped_with_the_known_classes(folder: Path) -> None:
    (folder / "lemon").rename(folder / "lime")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("not an image")
    splits = scan_once(folder, CLASSES, IMAGES)
    assert splits.class_counts(4).tolist() == [8, 8, 0, 8]
    assert reasons(splits, folder) == {
        "lime": "class not in the task, whose classes are apple, kiwi, lemon, plum; add it to the run, rename or "
        "remove the folder",
        "notes/a.txt": ".txt is not a suffix of images",
    }


def test_a_folder_of_unknown_classes_is_refused_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"no images to train on: 40 files: .* are pear, quince; add.*rename.*\(apple, "
    ):
        scan_once(folder, ("pear", "quince"), IMAGES)


def test_the_same_image_in_two_classes_is_skipped(folder: Path) -> None:
    whole = contents(scan_once(folder, CLASSES, IMAGES))
    twice, other = sorted((folder / "kiwi").iterdir())[0], folder / "plum" / "copy.jpg"
    shutil.copyfile(twice, other)
    splits = scan_once(folder, CLASSES, IMAGES)
    found = {each.path: str(each) for each in splits.skipped}
    assert set(found) == {twice, other}
    assert str(other) in found[twice]
    assert "'plum'" in found[twice]
    assert str(twice) in found[other]
    assert "'kiwi'" in found[other]
    assert splits.class_counts(4).sum() + len(splits.test) == sum(map(len, whole)) - 1


def test_skipped_files_are_named_and_leftovers_of_systems_are_not_missed(folder: Path) -> None:
    before = contents(scan_once(folder, CLASSES, IMAGES))
    for name in ("kiwi/movie.mp4", "kiwi/deep/notes.txt", "lost.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "plum" / "00.jpg").read_bytes())
    for name in ("kiwi/.hidden.jpg", "kiwi/Thumbs.db", "kiwi/.DS_Store", "kiwi/._00.jpg", ".trash/a.jpg", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "plum" / "00.jpg").read_bytes())
    splits = scan_once(folder, CLASSES, IMAGES)
    assert contents(splits) == before
    missed = replace(splits, skipped=tuple(each for each in splits.skipped if not each.is_leftover))
    assert set(reasons(missed, folder)) == {"kiwi/movie.mp4", "kiwi/deep/notes.txt", "lost.jpg", "README.md"}
    assert len(splits.skipped) == 4 + 5


def test_an_image_in_both_folders_of_the_user_is_not_tested_on(folder: Path) -> None:
    root = split(folder)
    before = contents(scan_once(root, CLASSES, IMAGES))
    trained = sorted((root / "train" / "kiwi").iterdir())[0]
    shutil.copyfile(trained, root / "test" / "kiwi" / "again.jpg")
    splits = scan_once(root, CLASSES, IMAGES)
    assert contents(splits) == before
    assert set(reasons(splits, root)) == {"test/kiwi/again.jpg"}


@pytest.mark.parametrize("kind", ["missing", "empty", "empty classes", "no subfolders", "presplit"])
def test_a_folder_without_images_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "images"
    if kind != "missing":
        root.mkdir()
    for name in {"empty classes": ["kiwi"], "presplit": ["train", "test"]}.get(kind, []):
        (root / name).mkdir()
    if kind == "no subfolders":
        Image.new("RGB", (8, 8)).save(root / "a.png")
    with pytest.raises(InputError, match="does not exist" if kind == "missing" else "holds no images"):
        scan_once(root, CLASSES, IMAGES)


def test_unreadable_images_are_skipped_and_named(folder: Path) -> None:
    whole = sorted((folder / "plum").iterdir())[0]
    bad = {
        "truncated.jpg": whole.read_bytes()[:-400],
        "empty.png": b"",
        "text.jpeg": b"not an image",
        "page.webp": b"RIFF\0\0\0\0WEBP",
    }
    before = contents(scan_once(folder, CLASSES, IMAGES))
    for name, data in bad.items():
        (folder / "plum" / name).write_bytes(data)
    (folder / "plum" / "folder.jpg").mkdir()
    splits = scan_once(folder, CLASSES, IMAGES)
    assert set(reasons(splits, folder)) == {f"plum/{name}" for name in bad}
    assert all(reason.startswith("not a readable image: it is ") for reason in reasons(splits, folder).values())
    assert contents(splits) == before
    for name in bad:
        with pytest.raises(InputError, match=name):
            reader_for(PREPROCESSING).load(folder / "plum" / name)


def test_held_out_samples_of_a_class_are_similar_and_as_many_as_before(tmp_path: Path) -> None:
    splits = scan_once(write_photos(tmp_path, 13), CLASSES, IMAGES)
    images = splits.unassigned_samples
    assert images == splits.train + splits.held_out
    rng = np.random.default_rng(3)
    scenes = rng.normal(size=(2, 8))
    scene_of = {image: index % 2 for index, image in enumerate(sorted(images, key=lambda i: i.sha256))}
    features = np.array([scenes[scene_of[i]] + rng.normal(size=8) * 0.01 for i in images], np.float32)
    assigned = assign_new_samples(splits, features)
    assert not assigned.unassigned_samples
    assert {*assigned.train, *assigned.held_out} == set(images)
    for label in range(len(CLASSES)):
        held_out = [image for image in assigned.held_out if image.label == label]
        assert len(held_out) == sum(image.label == label for image in splits.held_out) == 2
        assert len({scene_of[image] for image in held_out}) == 1


def test_texts_are_split_like_images_and_unreadable_ones_are_named(texts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(texts, tmp_path / "texts")
    before = contents(scan_once(folder, CLASSES, TEXTS))
    bad = {"latin.txt": "Köln".encode("latin-1"), "empty.txt": b"", "blank.TXT": b" \n\t", "cut.txt": "ü".encode()[:1]}
    for name, data in bad.items():
        (folder / CLASSES[0] / name).write_bytes(data)
    splits = scan_once(folder, CLASSES, TEXTS)
    assert reasons(splits, folder) == {
        f"{CLASSES[0]}/{name}": "not a readable text: "
        + ("it is not UTF-8; save it as UTF-8" if data.strip() else "it is empty")
        for name, data in bad.items()
    }
    assert contents(splits) == before
    assert {sample.path for part in (splits.train, splits.held_out, splits.test) for sample in part} == {
        *texts_of(folder, without=set(bad))
    }


def texts_of(folder: Path, without: set[str]) -> list[Path]:
    return [path for path in folder.rglob("*.txt") if path.name not in without]


def test_a_folder_of_the_other_kind_holds_nothing(texts: Path, photos: Path) -> None:
    with pytest.raises(InputError, match=f"text folder {photos} holds no texts"):
        scan_once(photos, CLASSES, TEXTS)
    with pytest.raises(InputError, match=f"image folder {texts} holds no images"):
        scan_once(texts, CLASSES, IMAGES)
