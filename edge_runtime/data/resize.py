"""A decoded image → the square that a model reads."""

from __future__ import annotations

from PIL import Image

from fedfmsl.protocol.bundle import FILTERS, ImagePreprocessing, Resize


def to_square(image: Image.Image, preprocessing: ImagePreprocessing) -> Image.Image:
    """The image with S pixels per side: resized as the preprocessing says, then cropped to its centre."""
    size, resize = preprocessing.size, preprocessing.resize
    if resize is None:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    else:
        width, height = _resized(image.size, resize)
        image = image.resize((width, height), Image.Resampling(FILTERS.index(resize.filter)))
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _resized(size: tuple[int, int], resize: Resize) -> tuple[int, int]:
    """Width and height. The longer side is cut to whole pixels, as transformers does it."""
    if not resize.keep_ratio:
        return resize.edge, resize.edge
    width, height = size
    if width <= height:
        return resize.edge, int(resize.edge * height / width)
    return int(resize.edge * width / height), resize.edge
