"""The formats of sample files by the suffix of their names: those that are read, and those that have to be converted.

All suffixes are declared here, in lower case. `edge_runtime.data` reads the files.
"""

from __future__ import annotations

import posixpath

# Pillow's name of an image format → the suffixes of its files. AVIF needs Pillow 11.3 or newer, HEIF pillow-heif.
READ_IMAGES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
# Many camera RAW files are TIFF files whose only readable image is a thumbnail, so they are never opened.
UNREAD_IMAGES = {
    "camera RAW": (
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw"),
        *(".orf", ".pef", ".raf", ".raw", ".rw2", ".sr2", ".srf", ".srw", ".x3f"),
    ),
    "JPEG 2000": (".jp2", ".j2k", ".jpx"),
    "JPEG XL": (".jxl",),
    "Photoshop": (".psd",),
    "SVG": (".svg",),
    "PostScript": (".eps",),
    "icon": (".ico",),
    "OpenEXR": (".exr",),
    "TGA": (".tga",),
    "Netpbm": (".pbm", ".pgm", ".pnm", ".ppm"),
}
TEXT_SUFFIXES = frozenset({".txt"})
IMAGE_SUFFIXES = frozenset(
    suffix for formats in (READ_IMAGES, UNREAD_IMAGES) for each in formats.values() for suffix in each
)
_UNREAD = {suffix: name for name, suffixes in UNREAD_IMAGES.items() for suffix in suffixes}


def unread_format(name: str) -> str:
    """The format of a file by its name, if it is one of UNREAD_IMAGES; otherwise ""."""
    return _UNREAD.get(posixpath.splitext(name)[1].lower(), "")
