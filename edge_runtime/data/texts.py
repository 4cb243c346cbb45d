"""Text files → the token ids that graphs read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedfmsl.errors import BundleError, ConfigError, InputError
from fedfmsl.protocol.bundle import TextPreprocessing

SUFFIXES = frozenset({".txt"})

Tokens = NDArray[np.int64]


def is_readable(path: Path) -> bool:
    return _text(path) is not None


def length(path: Path) -> int:
    """In bytes."""
    return path.stat().st_size


class TextTokenizer:
    """A file of Hugging Face's `tokenizers`, and the length a bundle takes."""

    def __init__(self, json: str, preprocessing: TextPreprocessing) -> None:
        """Raises ConfigError if the tokenizers package is not installed, BundleError if `json` is not its file."""
        try:
            from tokenizers import Tokenizer  # only devices that read texts have it
        except ImportError as error:
            raise ConfigError(
                "this model reads texts, and the tokenizers package is not installed: pip install tokenizers"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # the package raises nothing more special
            raise BundleError(f"the model's tokenizer cannot be read: {str(error).splitlines()[0]}") from error
        length = preprocessing.max_tokens
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=preprocessing.pad_id)

    def load(self, path: Path) -> Tokens:
        """The token ids (N,) of one text: cut off at N, or padded.

        Raises InputError if the file is empty or not UTF-8.
        """
        text = _text(path)
        if text is None:
            raise InputError(f"{path} is not a readable text; it must be UTF-8 and not empty")
        return np.array(self._tokenizer.encode(text).ids, np.int64)


def _text(path: Path) -> str | None:
    """What the file says, or None if it is not UTF-8 or says nothing."""
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text or None
