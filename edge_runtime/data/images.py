"""Image files → the pixels that graphs read.

The memory for a file is bounded: a JPEG is decoded at a reduced scale, a strip is cropped before it is resized, and an
image that still needs more than MAX_BYTES is refused. Public functions raise UnreadableError for a file that cannot be
read.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from edge_runtime.data.resize import to_square
from edge_runtime.data.unreadable import UnreadableError, decoding
from edge_runtime.engines.memory import usable_memory
from fedfmsl.common.sample_formats import READ_IMAGES
from fedfmsl.protocol.bundle import ImagePreprocessing

REDUCING_GAP = 3  # a JPEG is decoded at this many times the target size or larger; the loss is not visible
MAX_ASPECT = 16  # longer side per shorter side; of a longer strip, only the middle is resized
MAX_BYTES = min(2**30, usable_memory() // 4)  # of memory for one image
RGB_BYTES = 8  # of memory per pixel: the decoded image, and its upright copy
OTHER_BYTES = 20  # per pixel with other channels, which are converted, and in formats with a buffer of their own
BUFFERED = frozenset({"WEBP", "AVIF", "HEIF"})
WHITE = (255, 255, 255)
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow asks a plugin only for files with its magic bytes, and would load all plugins to find one that is missing.
for _plugin in ("Bmp", "Gif", "Png", "Tiff", "WebP", "Avif"):
    with suppress(ImportError):
        import_module(f"PIL.{_plugin}ImagePlugin")

_AVIF = re.compile(rb"....ftyp.*avi[fs]", re.DOTALL)
_HEIF = re.compile(rb"....ftyp.*(he[iv][cxms]|mif1|msf1)", re.DOTALL)

Pixels = NDArray[np.uint8]


def decoders() -> str:
    """What decides which images can be read: the versions of the packages that decode them, and the memory for one."""
    return f"{_versions()}, {MAX_BYTES} bytes"


@cache
def _versions() -> str:
    """Of the packages of this process. To look for them takes as long as the scan of a small folder."""
    found = []
    for name in ("fedfmsl-edge", "pillow", "pillow-heif"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


@decoding()
def check(data: bytes) -> None:
    """Raises UnreadableError if the image cannot be read."""
    _decode(data, size=1)


@decoding()
def extent(file: BinaryIO, file_size: int, size: int) -> int:
    """Bytes of memory that reading an image as (size, size) takes."""
    with _opened(file) as image:
        return file_size + _reduce(image, size)


@decoding()
def decode_pixels(data: bytes, preprocessing: ImagePreprocessing) -> Pixels:
    """An image file's bytes as (S, S, 3) uint8 RGB."""
    return np.asarray(to_square(_decode(data, preprocessing.edge), preprocessing))


@decoding()
def thumbnail(data: bytes, size: int) -> bytes:
    """An image file's bytes as an upright JPEG whose sides have at most `size` pixels."""
    image, made = _decode(data, size), io.BytesIO()
    image.thumbnail((size, size))
    image.save(made, "JPEG", quality=80)
    return made.getvalue()


def _decode(data: bytes, size: int) -> Image.Image:
    """The upright RGB image, with sides long enough for `size`, on white where it is transparent."""
    with _opened(io.BytesIO(data)) as file:
        pixels, needed = file.width * file.height, _reduce(file, size)
        if needed > MAX_BYTES:
            raise UnreadableError(
                f"its {pixels / 1e6:.0f} megapixels need {needed / 1e6:.0f} MB of memory, more than the limit of "
                f"{MAX_BYTES / 1e6:.0f} MB; make it smaller"
            )
        file.load()
        turn = UPRIGHT.get(_orientation(file))
        image = _rgb(_middle(file))
        return image if turn is None else image.transpose(turn)


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Image.Image]:
    """The image in a file, not decoded yet. Raises for formats that are not in READ_IMAGES, too."""
    start = file.read(64)
    file.seek(0)
    if not start:
        raise UnreadableError("it is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large images, which have a limit here, and about unusual metadata
        try:
            with _open(file, start) as image:
                yield image
        except Image.DecompressionBombError as error:
            raise UnreadableError("it has too many pixels; make it smaller") from error
        except UnidentifiedImageError as error:
            names = ", ".join(READ_IMAGES)
            raise UnreadableError(f"it is damaged, or none of {names}; convert it to JPEG or PNG") from error


def _open(file: BinaryIO, start: bytes) -> Image.Image:
    if start.startswith(b"\xff\xd8\xff"):
        return JpegImageFile(file)  # Image.open refuses a large JPEG before its reduction
    if _AVIF.match(start):
        if not features.check("avif"):
            raise UnreadableError("AVIF needs Pillow 11.3 or newer: pip install --upgrade pillow")
    elif _HEIF.match(start):
        _register_heif()
    return Image.open(file, formats=[name for name in READ_IMAGES if name in Image.OPEN])


@cache
def _register_heif() -> None:
    try:
        import pillow_heif  # an optional dependency
    except ImportError as error:
        raise UnreadableError("HEIF needs the package pillow-heif: pip install pillow-heif") from error
    pillow_heif.register_heif_opener()


def _reduce(image: Image.Image, size: int) -> int:
    """Has a JPEG decoded at down to an eighth of its scale, in a fraction of the memory. Other formats cannot.

    Returns the bytes of memory that decoding takes.
    """
    whole = image.width * image.height
    image.draft(None, (REDUCING_GAP * size, REDUCING_GAP * size))
    each = RGB_BYTES if image.mode == "RGB" and image.format not in BUFFERED else OTHER_BYTES
    needed = image.width * image.height * each
    if isinstance(image, JpegImageFile) and image.info.get("progressive"):  # its coefficients are kept at any scale
        sampling = [(across, down) for _, across, down, _ in image.layer]
        full = max(across for across, _ in sampling) * max(down for _, down in sampling)
        needed += 2 * whole * sum(across * down for across, down in sampling) // full
    return needed


def _orientation(image: Image.Image) -> int:
    """The EXIF tag; 0 if there is none. A damaged tag does not make an image unreadable."""
    try:
        return int(image.getexif().get(ORIENTATION, 0))
    except Exception:  # the parser raises nearly everything
        return 0


def _middle(image: Image.Image) -> Image.Image:
    """Cuts both ends off a strip of more than MAX_ASPECT. Only its middle is used, and scaling all of it may take
    gigabytes."""
    longest = MAX_ASPECT * min(image.size)
    width, height = (min(side, longest) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise UnreadableError("its pixels have 32 bits and no defined white; convert it to 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to white instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        drawn = image.convert("RGBA")
        if drawn.getchannel("A").getextrema() != (0, 0):  # a channel of zeros only is unused
            white = Image.new("RGB", drawn.size, WHITE)
            white.paste(drawn, mask=drawn)
            return white
    return image if image.mode == "RGB" else image.convert("RGB")
