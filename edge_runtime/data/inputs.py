"""The kinds of samples, images and texts: how their files are told, and how a bundle's graphs come to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data import images, texts
from fedfmsl.common.class_folders import files_below, has_suffix
from fedfmsl.protocol.bundle import Bundle, Preprocessing, TextPreprocessing


@dataclass(frozen=True)
class Kind:
    """`noun` names it in messages, and in the manifest's preprocessing. `ordinary` is an extent (see `Reader`) up to
    which reading takes no memory to speak of."""

    noun: str
    suffixes: frozenset[str]
    is_readable: Callable[[Path], bool]
    ordinary: int

    def files(self, folder: Path) -> list[Path]:
        """The files of this kind at any depth below `folder`, in the order of their names."""
        return [folder / name for name, _ in files_below(folder, "", []) if self.has_name(name)]

    def has_name(self, name: str) -> bool:
        """Whether a file name has one of the suffixes."""
        return has_suffix(name, self.suffixes)


IMAGES = Kind("image", images.SUFFIXES, images.is_readable, ordinary=2**22)
TEXTS = Kind("text", texts.SUFFIXES, texts.is_readable, ordinary=2**18)


@dataclass(frozen=True)
class Reader:
    """Reads files as the input of one bundle's graphs, or of one personalized model's. `extent` is what the memory that
    reading a file takes grows with: decoded pixels, or bytes of text."""

    kind: Kind
    input: str
    load: Callable[[Path], NDArray[Any]]
    extent: Callable[[Path], int]

    def batch(self, paths: Sequence[Path]) -> dict[str, NDArray[Any]]:
        """`pixels` (B, S, S, 3) uint8 or `tokens` (B, N) int64. Raises InputError if a file cannot be read."""
        return {self.input: np.stack([self.load(path) for path in paths])}


def reader_for(preprocessing: Preprocessing, tokenizer: str) -> Reader:
    """`tokenizer` is the JSON of a text model's tokenizer.

    Raises ConfigError or BundleError if texts cannot be tokenized here.
    """
    if isinstance(preprocessing, TextPreprocessing):
        return Reader(TEXTS, "tokens", texts.TextTokenizer(tokenizer, preprocessing).load, texts.length)
    load = partial(images.load_pixels, preprocessing=preprocessing)
    return Reader(IMAGES, "pixels", load, partial(images.pixel_count, size=preprocessing.size))


def reader_of(bundle: Bundle) -> Reader:
    return reader_for(bundle.manifest.preprocessing, bundle.tokenizer())
