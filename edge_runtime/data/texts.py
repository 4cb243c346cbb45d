"""Text files → the token ids that graphs read."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedfmsl.errors import BundleError, ConfigError
from fedfmsl.protocol.bundle import TextPreprocessing

Tokens = NDArray[np.int64]


def is_readable(data: bytes) -> bool:
    return _text(data) is not None


def extent(file: BinaryIO, file_size: int) -> int:
    """The memory to read a text, in bytes."""
    return file_size


class TextTokenizer:
    """Tokenizes texts with Hugging Face's `tokenizers`, to the text length of a bundle."""

    def __init__(self, json: str, preprocessing: TextPreprocessing) -> None:
        """Raises ConfigError if the tokenizers package is not installed, BundleError if `json` cannot be parsed."""
        try:
            from tokenizers import Tokenizer  # only devices that read texts have the package
        except ImportError as error:
            raise ConfigError(
                "this model reads texts, and the tokenizers package is not installed: pip install tokenizers"
            ) from error
        try:
            self._tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # the package raises no narrower type
            raise BundleError(
                f"the model's tokenizer cannot be read: {str(error).splitlines()[0]}; build the bundle again"
            ) from error
        length = preprocessing.max_tokens
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=preprocessing.pad_id)

    def decode(self, data: bytes) -> Tokens | None:
        """A text file's bytes as token ids (N,), truncated or padded. None if the text is empty or not UTF-8."""
        text = _text(data)
        return None if text is None else np.array(self._tokenizer.encode(text).ids, np.int64)


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").strip() or None
    except UnicodeDecodeError:
        return None
