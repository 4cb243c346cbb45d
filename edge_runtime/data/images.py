"""Image files → the pixels that graphs read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedfmsl.protocol.bundle import ImagePreprocessing

REDUCING_GAP = 3  # a JPEG is decoded at this many times the target size or larger; the loss is not visible
BYTES_PER_PIXEL = 3
UNREADABLE = (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError)

Pixels = NDArray[np.uint8]


def is_readable(data: bytes) -> bool:
    return _decode(data, size=1) is not None


def extent(file: BinaryIO, file_size: int, size: int) -> int:
    """Memory that reading an image as (size, size) takes, in pixels: the decoded image and the file's bytes."""
    return pixel_count(file, size) + file_size // BYTES_PER_PIXEL


def pixel_count(file: BinaryIO | Path, size: int) -> int:
    """The pixels in memory while an image is decoded for (size, size); 0 if the file is not an image."""
    try:
        with Image.open(file) as image:
            if not image.info.get("progressive"):  # a progressive JPEG is decoded whole at any scale
                _reduce(image, size)
            width, height = image.size
    except UNREADABLE:
        return 0
    return width * height


def decode_pixels(data: bytes, preprocessing: ImagePreprocessing) -> Pixels | None:
    """An image file's bytes as (S, S, 3) uint8 RGB: shorter side resized to S, centre cropped. None if unreadable."""
    size = preprocessing.size
    image = _decode(data, size)
    if image is None:
        return None
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _decode(data: bytes, size: int) -> Image.Image | None:
    """The upright RGB image, with sides long enough for `size`."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            _reduce(file, size)
            ImageOps.exif_transpose(file, in_place=True)
            image: Image.Image = file
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to white instead of scaling them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")
    except UNREADABLE:
        return None


def _reduce(image: Image.Image, size: int) -> None:
    """Has a JPEG decoded at down to an eighth of its scale, in a fraction of the memory. Other formats cannot."""
    image.draft(None, (REDUCING_GAP * size, REDUCING_GAP * size))
