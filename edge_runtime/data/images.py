"""Image files → the pixels that graphs read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedfmsl.errors import InputError
from fedfmsl.protocol.bundle import ImagePreprocessing

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
REDUCING_GAP = 3  # an image is not decoded smaller than this times what it is resized to: the difference is not seen
UNREADABLE = (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError)

Pixels = NDArray[np.uint8]


def is_readable(path: Path) -> bool:
    return _decoded(path, size=1) is not None


def pixel_count(path: Path, size: int) -> int:
    """How many pixels are in memory when an image is decoded that is to become (size, size); 0 if it is none."""
    try:
        with Image.open(path) as file:
            if not file.info.get("progressive"):  # of which the whole image is in memory at any scale
                _reduce(file, size)
            width, height = file.size
    except UNREADABLE:
        return 0
    return width * height


def load_pixels(path: Path, preprocessing: ImagePreprocessing) -> Pixels:
    """One image as (S, S, 3) uint8 RGB: shorter side resized to S, centre cropped.

    Raises InputError if it cannot be decoded.
    """
    size = preprocessing.size
    image = _decoded(path, size)
    if image is None:
        raise InputError(f"{path} is not a readable image")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _decoded(path: Path, size: int) -> Image.Image | None:
    """The upright RGB image, of a side that is enough for `size`, or None if the file cannot be decoded."""
    try:
        with Image.open(path) as file:
            _reduce(file, size)
            ImageOps.exif_transpose(file, in_place=True)
            image: Image.Image = file
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to white instead of scaling them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")
    except UNREADABLE:
        return None


def _reduce(file: Image.Image, size: int) -> None:
    """A JPEG can be decoded at down to an eighth of its scale, in a fraction of the memory; other formats cannot."""
    file.draft(None, (REDUCING_GAP * size, REDUCING_GAP * size))
