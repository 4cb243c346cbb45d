"""Synthetic photos and texts, one folder per class."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("apple", "kiwi", "lemon", "plum")
WORDS = ("a", "big", "ripe", "sweet", "basket", "of", "from", "the", "tree", *CLASSES)
AGE_SECONDS = 3600.0  # a device waits for files that were written just now


def write_photos(folder: Path, per_class: int = 10, classes: Sequence[str] = CLASSES, seed: int = 0) -> Path:
    """FOLDER/<class>/NN.jpg: each class has its own colour and stripes, each photo its own noise and size."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        angle = 2 * np.pi * label / len(classes)
        colour = 128 + 90 * np.cos(angle + np.array([0.0, 2.1, 4.2]))
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            height, width = rng.integers(36, 56, 2)
            rows, columns = np.mgrid[:height, :width]
            stripes = 30 * np.sin((rows * np.cos(angle) + columns * np.sin(angle)) / 3 + rng.uniform(0, 6))
            image = colour + stripes[..., None] + rng.normal(0, 12, (height, width, 3))
            pixels = np.clip(image, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02}.jpg", quality=92)
            make_old(folder / name / f"{index:02}.jpg")
    return folder


def write_device_photos(folder: Path, counts: Mapping[str, int], seed: int) -> Path:
    """`counts` photos at `folder`/<class>/, with the same file names in every class. A class has a colour and a width
    of stripes; light and noise differ from photo to photo, so that there is something to learn."""
    for name, count in counts.items():
        label = CLASSES.index(name)
        stripes = 40.0 * (np.arange(48) // (3 + 2 * label) % 2)[np.newaxis, :, np.newaxis]
        colour = 128 + 40 * np.cos(2 * np.pi * label / len(CLASSES) + np.array([0.0, 2.1, 4.2]))
        for index in range(count):
            rng = np.random.default_rng([seed, label, index])
            pixels = colour + stripes + rng.normal(0, 35, 3) + rng.normal(0, 25, (40, 48, 3))
            path = folder / name / f"{index:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=90)
            make_old(path)
    return folder


def write_texts(folder: Path, per_class: int = 10, classes: Sequence[str] = CLASSES, seed: int = 0) -> Path:
    """FOLDER/<class>/NN.txt: between 3 and 40 words, in which those of its class are more frequent."""
    rng = np.random.default_rng(seed)
    for name in classes:
        odds = np.array([5.0 if word == name else 1.0 for word in WORDS])
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            words = rng.choice(WORDS, rng.integers(3, 40), p=odds / odds.sum())
            (folder / name / f"{index:02}.txt").write_text(f"{' '.join(words)}.\n")
            make_old(folder / name / f"{index:02}.txt")
    return folder


LONG_AGO = 1_600_000_000


def set_dates(folder: Path, at: int = LONG_AGO) -> Path:
    """Dates all files below FOLDER, so that a scan does not take them for files that are being written."""
    for path in folder.rglob("*"):
        os.utime(path, (at, at))
    return folder


def make_old(path: Path) -> None:
    """Sets the time of the last change so far back that a device takes the file for completely written."""
    then = time.time() - AGE_SECONDS
    os.utime(path, (then, then))
