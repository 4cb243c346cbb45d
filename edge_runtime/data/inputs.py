"""The kinds of samples, images and texts: their file names, and how their bytes become the input of graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data import images, texts
from edge_runtime.data.unreadable import UnreadableError, UnreadableFileError, read_file
from fedfmsl.common.folder_walk import SkippedFile, files_below, has_suffix, wrong_suffix
from fedfmsl.common.sample_formats import IMAGE_SUFFIXES, TEXT_SUFFIXES
from fedfmsl.errors import shown
from fedfmsl.protocol.bundle import Bundle, Preprocessing, TextPreprocessing

# Of the code that decodes samples (this module, `images`, `resize`, `texts`). Raise it when the input that a file gives
# changes: cached features and remembered files of an earlier version are then not used.
DECODING = 1


@dataclass(frozen=True)
class Kind:
    """`noun` names a file in messages, and the kind in the manifest's preprocessing. `check` raises
    UnreadableError if a file's bytes cannot be read. Files of at most the extent `ordinary` (see `Reader`) take little
    memory to read."""

    noun: str
    suffixes: frozenset[str]
    check: Callable[[bytes], None]
    ordinary: int

    def files(self, folder: Path, skipped: list[SkippedFile]) -> list[Path]:
        """The files of this kind at any depth below `folder`, in the order of their names. What is not used is added to
        `skipped`."""
        found = []
        for name, _ in files_below(folder, "", skipped):
            if self.has_name(name):
                found.append(folder / name)
            else:
                skipped.append(wrong_suffix(folder / name, self.noun))
        return found

    def not_readable(self, reason: str) -> str:
        """What is wrong with a file that cannot be read for a `reason`."""
        return f"not a readable {self.noun}: {reason}"

    def has_name(self, name: str) -> bool:
        """Whether a file name has one of the suffixes."""
        return has_suffix(name, self.suffixes)


IMAGES = Kind("image", IMAGE_SUFFIXES, images.check, ordinary=2**25)
TEXTS = Kind("text", TEXT_SUFFIXES, texts.check, ordinary=2**22)


@dataclass(frozen=True)
class Reader:
    """Decodes files as the input of a bundle's graphs, or of a personalized model.

    `decode` gives the array for one file's bytes. `extent` of an open file and its size is the bytes of memory that
    reading it takes. Both raise UnreadableError if the file cannot be read.
    """

    kind: Kind
    input: str
    decode: Callable[[bytes], NDArray[Any]]
    extent: Callable[[BinaryIO, int], int]

    def load(self, path: Path) -> NDArray[Any]:
        """Raises UnreadableFileError if the file cannot be read."""
        try:
            return self.decode(read_file(path))
        except UnreadableError as error:
            text = f"{shown(path)} is {self.kind.not_readable(error.reason)}"
            raise UnreadableFileError(text, error.lasting) from error

    def batch(self, paths: Sequence[Path]) -> dict[str, NDArray[Any]]:
        """`pixels` (B, S, S, 3) uint8 or `tokens` (B, N) int64. Raises UnreadableFileError if a file cannot be read."""
        return {self.input: np.stack([self.load(path) for path in paths])}


def reader_for(preprocessing: Preprocessing, tokenizer: str = "") -> Reader:
    """`tokenizer`: JSON of a text model's tokenizer.

    Raises ConfigError if the tokenizers package is not installed, BundleError if the tokenizer cannot be parsed.
    """
    if isinstance(preprocessing, TextPreprocessing):
        return Reader(TEXTS, "tokens", texts.TextTokenizer(tokenizer, preprocessing).decode, texts.extent)
    decode = partial(images.decode_pixels, preprocessing=preprocessing)
    return Reader(IMAGES, "pixels", decode, partial(images.extent, size=preprocessing.edge))


def reader_of(bundle: Bundle) -> Reader:
    """`reader_for` the samples of a bundle. It parses a text model's tokenizer, so keep the reader."""
    return reader_for(bundle.manifest.preprocessing, bundle.tokenizer())
