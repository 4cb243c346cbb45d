"""Text files → the token ids that graphs read."""

from __future__ import annotations

import codecs
import re
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.unreadable import UnreadableError, decoding
from fedfmsl.errors import BundleError, ConfigError
from fedfmsl.protocol.bundle import TextPreprocessing

# A text is cut to this before it is tokenized, which takes a hundred times its memory. A model keeps hundreds of tokens
# of about five characters.
MAX_CHARACTERS = 2**17
MAX_BYTES = 4 * MAX_CHARACTERS  # in UTF-8

Tokens = NDArray[np.int64]


def check(data: bytes) -> None:
    """Raises UnreadableError if the text is empty or not UTF-8, up to MAX_CHARACTERS."""
    _text(data)


def extent(file: BinaryIO, file_size: int) -> int:
    """Bytes of memory that reading a text takes."""
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
        self.pad_token: str = self._tokenizer.id_to_token(preprocessing.pad_id) or ""

    @decoding()
    def decode(self, data: bytes) -> Tokens:
        """A text file's bytes as token ids (N,), truncated or padded. Raises UnreadableError as `check` does."""
        return np.array(self._tokenizer.encode(_text(data)).ids, np.int64)


def _text(data: bytes) -> str:
    blank = re.compile(rb"(\xef\xbb\xbf)?\s*").match(data)  # a byte order mark, and what strip() removes
    start = data[blank.end() if blank else 0 :][:MAX_BYTES]
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < MAX_BYTES)
    except UnicodeDecodeError as error:
        raise UnreadableError("it is not UTF-8; save it as UTF-8") from error
    text = text[:MAX_CHARACTERS].replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise UnreadableError("it is empty")
    return text
