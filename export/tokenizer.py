"""Reads a text model's tokenizer.json, the format of Hugging Face's `tokenizers`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from fedfmsl.errors import WeightsError


def read_tokenizer(path: Path, vocabulary: int) -> str:
    """The file's JSON. Raises WeightsError if it is not a tokenizer or has more than `vocabulary` tokens."""
    try:
        json = path.read_text(encoding="utf-8")
        size = Tokenizer.from_str(json).get_vocab_size()
    except Exception as error:  # the package raises plain Exception
        raise WeightsError(f"{path} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
    if size > vocabulary:
        raise WeightsError(
            f"{path} has {size} tokens, but the model has {vocabulary}; pass the model's own tokenizer with --tokenizer"
        )
    return json
