"""Folders of images, as users have them, and what becomes of their pixels."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import CLASSES, write_photos

from edge_runtime.images import Slices, hold_out_look_alikes, labels_of, load_pixels, scan
from protocol.bundle import Preprocessing
from protocol.errors import InputError

SIZE = 32
PREPROCESSING = Preprocessing(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


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


def contents(slices: Slices) -> list[list[tuple[str, int]]]:
    return [[(i.sha256, i.label) for i in part] for part in (slices.train, slices.held_out, slices.test)]


def test_a_flat_folder_is_split_per_class_without_overlap(folder: Path) -> None:
    slices = scan(folder, CLASSES)
    assert [np.bincount(labels_of(s)).tolist() for s in (slices.train, slices.held_out, slices.test)] == [
        [6] * 4,
        [2] * 4,
        [2] * 4,
    ]
    images = [*slices.train, *slices.held_out, *slices.test]
    assert {i.path for i in images} == set(folder.rglob("*.jpg"))
    assert all(i.path.parent.name == CLASSES[i.label] for i in images)
    assert all(hashlib.sha256(i.path.read_bytes()).hexdigest() == i.sha256 for i in images)
    assert slices.class_counts(5).tolist() == [8, 8, 8, 8, 0]


def test_a_folder_with_train_and_test_keeps_the_users_test_slice(folder: Path) -> None:
    slices = scan(split(folder), CLASSES)
    assert {i.path for i in slices.test} == set((folder / "test").rglob("*.jpg"))
    assert np.bincount(labels_of(slices.train)).tolist() == [6] * 4
    assert np.bincount(labels_of(slices.held_out)).tolist() == [1] * 4


@pytest.mark.parametrize("presplit", [True, False])
def test_slices_are_the_same_under_other_names_and_dates(folder: Path, presplit: bool) -> None:
    root = split(folder) if presplit else folder
    before = contents(scan(root, CLASSES))
    for index, path in enumerate(sorted(root.rglob("*.jpg"), reverse=True)):
        path.rename(path.with_name(f"renamed-{index}.JPEG"))
    assert contents(scan(root, CLASSES)) == before


def test_labels_follow_the_bundles_order_of_classes(folder: Path) -> None:
    slices = scan(folder, ("plum", "x", "lemon", "kiwi", "apple"))
    assert {(i.path.parent.name, i.label) for i in slices.train} == {
        ("plum", 0),
        ("lemon", 2),
        ("kiwi", 3),
        ("apple", 4),
    }


@pytest.mark.parametrize(("count", "sizes"), [(2, [1, 1, 0]), (3, [1, 1, 1]), (4, [2, 1, 1])])
def test_small_classes_still_train_and_hold_out(tmp_path: Path, count: int, sizes: list[int]) -> None:
    slices = scan(write_photos(tmp_path, count), CLASSES)
    assert [len(part) for part in (slices.train, slices.held_out, slices.test)] == [4 * size for size in sizes]


def test_a_class_with_one_image_is_refused_by_name(folder: Path) -> None:
    for path in sorted((folder / "kiwi").iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match=r"'kiwi'.*one readable image"):
        scan(folder, CLASSES)


def test_an_image_that_stands_twice_counts_once(folder: Path) -> None:
    before = contents(scan(folder, CLASSES))
    for path in list((folder / "kiwi").iterdir()):
        shutil.copyfile(path, path.with_name(f"copy of {path.name}"))
    assert contents(scan(folder, CLASSES)) == before


def test_a_class_the_bundle_does_not_know_is_refused_with_those_it_does(folder: Path) -> None:
    (folder / "lemon").rename(folder / "lime")
    with pytest.raises(InputError, match=r"lime is not a class.*apple, kiwi, lemon, plum"):
        scan(folder, CLASSES)


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
        scan(root, CLASSES)


def test_unreadable_images_are_skipped_and_named(folder: Path) -> None:
    whole = sorted((folder / "plum").iterdir())[0]
    bad = {
        "truncated.jpg": whole.read_bytes()[:-400],
        "empty.png": b"",
        "text.jpeg": b"not an image",
        "page.webp": b"RIFF\0\0\0\0WEBP",
    }
    before = contents(scan(folder, CLASSES))
    for name, data in bad.items():
        (folder / "plum" / name).write_bytes(data)
    (folder / "plum" / "notes.txt").write_text("not for us")
    (folder / "plum" / "folder.jpg").mkdir()
    slices = scan(folder, CLASSES)
    assert {path.name for path in slices.unreadable} == set(bad)
    assert contents(slices) == before
    for name in bad:
        with pytest.raises(InputError, match=name):
            load_pixels(folder / "plum" / name, PREPROCESSING)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
@pytest.mark.parametrize("size", [(32, 32), (33, 57), (500, 3), (1, 1), (7, 640)])
def test_every_mode_and_shape_becomes_square_rgb(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    suffix = ".jpg" if mode == "CMYK" else ".png"
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    grey16 = noise[:, :, 0].astype(np.uint16) * 257
    image = Image.fromarray(grey16) if mode == "I;16" else Image.fromarray(noise).convert(mode)
    image.save(tmp_path / f"image{suffix}")
    pixels = load_pixels(tmp_path / f"image{suffix}", PREPROCESSING)
    assert pixels.shape == (SIZE, SIZE, 3)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 0 or size == (1, 1)


def test_the_centre_of_the_shorter_side_is_kept(tmp_path: Path) -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = (255, 0, 0)  # the middle third
    for name, array in (("wide.png", wide), ("tall.png", wide.transpose(1, 0, 2))):
        Image.fromarray(array).save(tmp_path / name)
        pixels = load_pixels(tmp_path / name, PREPROCESSING)
        assert np.median(pixels.reshape(-1, 3), axis=0).tolist() == [255, 0, 0]
        assert pixels[8:-8, 8:-8, 0].min() > 250


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.random.default_rng(2).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    eight, sixteen = (load_pixels(tmp_path / name, PREPROCESSING) for name in ("8.png", "16.png"))
    assert np.array_equal(eight, sixteen)


def test_an_image_is_turned_upright_as_its_orientation_tag_says(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held a quarter turn to the left
    image.rotate(-90, expand=True).save(tmp_path / "upright.png")
    image.save(tmp_path / "tagged.png", exif=turned)
    upright, tagged = (load_pixels(tmp_path / name, PREPROCESSING) for name in ("upright.png", "tagged.png"))
    assert np.array_equal(upright, tagged)


def test_what_is_held_out_of_a_class_looks_alike_and_is_as_much_as_before(tmp_path: Path) -> None:
    slices = scan(write_photos(tmp_path, 13), CLASSES)
    images = slices.train + slices.held_out
    rng = np.random.default_rng(3)
    scenes = rng.normal(size=(2, 8))
    scene_of = {image: index % 2 for index, image in enumerate(sorted(images, key=lambda i: i.sha256))}
    features = np.array([scenes[scene_of[i]] + rng.normal(size=8) * 0.01 for i in images], np.float32)
    dealt = hold_out_look_alikes(slices, features)
    assert {*dealt.train, *dealt.held_out} == set(images)
    for label in range(len(CLASSES)):
        held_out = [image for image in dealt.held_out if image.label == label]
        assert len(held_out) == sum(image.label == label for image in slices.held_out) == 2
        assert len({scene_of[image] for image in held_out}) == 1
