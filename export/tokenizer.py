"""Where a text model's tokenizer comes from: a file that is given, or the one beside the weights."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from transformers.utils import cached_file

from protocol.bundle import TOKENIZER
from protocol.errors import ConfigError, WeightsError


def read_tokenizer(given: Path | None, source: str | None, revision: str | None, vocabulary: int) -> str:
    """The JSON of Hugging Face's `tokenizers`, from the file `given`, or of the folder or hub model `source`.

    Raises ConfigError if there is neither, WeightsError if what is there is no tokenizer of `vocabulary` tokens.
    """
    if given is None and source is None:
        raise ConfigError(
            f"random weights bring no tokenizer; add --tokenizer FILE, the {TOKENIZER} of any model of this family"
        )
    path = given or _beside_weights(str(source), revision)
    try:
        json = path.read_text(encoding="utf-8")
        known = Tokenizer.from_str(json).get_vocab_size()
    except Exception as error:  # the package raises nothing more special
        raise WeightsError(f"{path} is not a tokenizer: {str(error).splitlines()[0]}") from error
    if known > vocabulary:
        raise WeightsError(f"{path} knows {known} tokens, the model only {vocabulary}; it is another model's")
    return json


def _beside_weights(source: str, revision: str | None) -> Path:
    try:
        found = cached_file(source, TOKENIZER, revision=revision)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source} has no {TOKENIZER}; add --tokenizer FILE") from error
    return Path(str(found))
