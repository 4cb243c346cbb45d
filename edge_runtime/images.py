"""Image files → the pixels that graphs read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from protocol.bundle import ImagePreprocessing
from protocol.errors import InputError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

Pixels = NDArray[np.uint8]


def is_readable(path: Path) -> bool:
    return _decoded(path) is not None


def pixel_count(path: Path) -> int:
    """Of a readable image, before it is resized."""
    with Image.open(path) as file:
        width, height = file.size
    return width * height


def load_pixels(path: Path, preprocessing: ImagePreprocessing) -> Pixels:
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
