"""A text model's tokenizer, as a file of Hugging Face's `tokenizers`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from fedfmsl.errors import WeightsError


def read_tokenizer(path: Path, vocabulary: int) -> str:
    """The file's JSON. Raises WeightsError if it is no tokenizer, or one of more than `vocabulary` tokens."""
    try:
        json = path.read_text(encoding="utf-8")
        known = Tokenizer.from_str(json).get_vocab_size()
    except Exception as error:  # the package raises nothing more special
        raise WeightsError(f"{path} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
    if known > vocabulary:
        raise WeightsError(f"{path} knows {known} tokens, the model only {vocabulary}; it is another model's")
    return json
