"""A folder of labelled images → the slices a device trains, holds out and tests on.

Two forms are understood: `DIR/<class>/…`, split here, and `DIR/train/<class>/…` with `DIR/test/<class>/…`, where the
user has split off a test slice. Slices follow the images' content, not their names or dates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from protocol.bundle import Preprocessing
from protocol.errors import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
HELD_OUT_SHARE = 0.2
TEST_SHARE = 0.2

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class LabelledImage:
    path: Path
    sha256: str
    label: int


@dataclass(frozen=True)
class Slices:
    """A device's images. `held_out` chooses levels and the best expert and trains the gate; `test` only measures."""

    train: tuple[LabelledImage, ...]
    held_out: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]
    unreadable: tuple[Path, ...]

    def class_counts(self, classes: int) -> NDArray[np.int64]:
        """Images per class (C,), the test slice left out."""
        return np.bincount(labels_of(self.train + self.held_out), minlength=classes)


def labels_of(images: Sequence[LabelledImage]) -> NDArray[np.int64]:
    return np.array([image.label for image in images], np.int64)


def hold_out_look_alikes(slices: Slices, features: NDArray[np.float32]) -> Slices:
    """Deals the training and held-out images anew: what is held out of each class are images that look alike (ours).

    A camera takes many pictures of one scene. Held out at random, each has a twin that was trained on, and looks easier
    than what the camera will see next. `features` (n, D) are of `slices.train + slices.held_out`; each class gives the
    image with the least hash and those most similar to it, as many as were held out before.
    """
    images = slices.train + slices.held_out
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    chosen: set[int] = set()
    for label, count in enumerate(np.bincount(labels_of(slices.held_out))):
        members = sorted((i for i, image in enumerate(images) if image.label == label), key=lambda i: images[i].sha256)
        if members:
            similarity = directions[members] @ directions[members[0]]
            chosen.update(members[i] for i in np.argsort(-similarity, kind="stable")[:count])
    return replace(
        slices,
        train=tuple(image for i, image in enumerate(images) if i not in chosen),
        held_out=tuple(image for i, image in enumerate(images) if i in chosen),
    )


def image_files(folder: Path) -> list[Path]:
    """The files at any depth below `folder` that are named like images, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def is_readable(path: Path) -> bool:
    return _decoded(path) is not None


def load_pixels(path: Path, preprocessing: Preprocessing) -> Pixels:
    """One image as (S, S, 3) uint8 RGB: shorter side resized to S, centre cropped.

    Raises InputError if it cannot be decoded.
    """
    size = preprocessing.size
    image = _decoded(path)
    if image is None:
        raise InputError(f"{path} is not a readable image")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def scan(folder: Path, classes: Sequence[str]) -> Slices:
    """Every readable image below `folder`, in slices.

    Raises InputError if there are none, if a class folder has an unknown name, or if a class that is trained on has
    fewer than two images (one to train on, one to hold out).
    """
    if not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist")
    unreadable: list[Path] = []
    presplit = (folder / "train").is_dir() and (folder / "test").is_dir()
    by_class = _by_class(folder / "train" if presplit else folder, classes, unreadable)
    if not by_class:
        raise InputError(f"image folder {folder} holds no images; put them into one subfolder per class")
    known = {image.sha256 for image in _flat(by_class)}
    tests = _flat(_by_class(folder / "test", classes, unreadable)) if presplit else []
    test = [image for image in tests if image.sha256 not in known]  # an image cannot test what it has trained
    train: list[LabelledImage] = []
    held_out: list[LabelledImage] = []
    for label, images in by_class.items():
        if len(images) < 2:
            raise InputError(
                f"class {classes[label]!r} in {folder} has one readable image; it needs at least two "
                "(one to train on, one to hold out): add images or remove the folder"
            )
        tested = 0 if presplit else min(round(TEST_SHARE * len(images)), len(images) - 2)
        held = tested + max(1, round(HELD_OUT_SHARE * (len(images) - tested)))
        test += images[:tested]
        held_out += images[tested:held]
        train += images[held:]
    return Slices(tuple(train), tuple(held_out), tuple(test), tuple(unreadable))


def _by_class(folder: Path, classes: Sequence[str], unreadable: list[Path]) -> dict[int, list[LabelledImage]]:
    """Readable images per class, ordered by content hash; an image that stands twice counts once."""
    found: dict[int, list[LabelledImage]] = {}
    for subfolder in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        paths = image_files(subfolder)
        if not paths:
            continue
        if subfolder.name not in classes:
            raise InputError(
                f"{subfolder} is not a class of this bundle, which knows {', '.join(classes[:8])}"
                f"{', …' if len(classes) > 8 else ''}; rename or remove the folder"
            )
        label = list(classes).index(subfolder.name)
        images = {}
        for path in paths:
            data = path.read_bytes()
            if is_readable(path):
                sha256 = hashlib.sha256(data).hexdigest()
                images[sha256] = LabelledImage(path, sha256, label)
            else:
                unreadable.append(path)
        if images:
            found[label] = [images[key] for key in sorted(images)]
    return found


def _decoded(path: Path) -> Image.Image | None:
    """The upright RGB image, or None if the file cannot be decoded."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to white instead of scaling them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _flat(by_class: dict[int, list[LabelledImage]]) -> list[LabelledImage]:
    return [image for images in by_class.values() for image in images]
