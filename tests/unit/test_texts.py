"""The tokens that graphs read from users' text files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.samples import WORDS
from support.tiny_models import SPECIAL, write_tokenizer

from edge_runtime.data.inputs import TEXTS, reader_for
from fedfmsl.errors import BundleError, ConfigError, InputError
from fedfmsl.protocol.bundle import TextPreprocessing

N = 8
PREPROCESSING = TextPreprocessing(max_tokens=N, pad_id=0)
VOCABULARY = (*SPECIAL, ".", *WORDS)
UNK, CLS, SEP = 1, 2, 3


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return write_tokenizer(tmp_path / "tokenizer.json").read_text()


def tokens_of(tokenizer: str, path: Path, data: bytes) -> list[int]:
    path.write_bytes(data)
    reader = reader_for(PREPROCESSING, tokenizer)
    assert reader.kind is TEXTS
    batch = reader.batch([path, path])
    assert set(batch) == {"tokens"}
    assert batch["tokens"].dtype == "int64"
    first, second = batch["tokens"].tolist()
    assert first == second
    return first


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"ripe kiwi", ["ripe", "kiwi"]),
        (b"\xef\xbb\xbf ripe\r\nkiwi\n", ["ripe", "kiwi"]),  # a byte order mark and CRLF
        (b"a durian", ["a", "[UNK]"]),
        ("a größe".encode(), ["a", "[UNK]"]),
        (b"a", ["a"]),
    ],
)
def test_a_short_text_is_padded(tokenizer: str, tmp_path: Path, data: bytes, words: list[str]) -> None:
    tokens = [CLS, *map(VOCABULARY.index, words), SEP]
    assert tokens_of(tokenizer, tmp_path / "a.txt", data) == tokens + [0] * (N - len(tokens))


def test_a_long_text_is_truncated_and_keeps_its_special_tokens(tokenizer: str, tmp_path: Path) -> None:
    tokens = tokens_of(tokenizer, tmp_path / "a.txt", b"ripe kiwi " * 50)
    assert tokens == [CLS, *map(VOCABULARY.index, ["ripe", "kiwi"] * 3), SEP]


def test_length_and_padding_come_from_the_bundle_not_from_the_tokenizer_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = write_tokenizer(tmp_path / "tokenizer.json")
    stored = Tokenizer.from_file(str(path))
    stored.enable_truncation(4)
    stored.enable_padding(direction="left", length=6, pad_id=7)
    assert tokens_of(stored.to_str(), tmp_path / "a.txt", b"a big ripe") == [CLS, 5, 6, 7, SEP, 0, 0, 0]


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff\xfe", "ü".encode()[:1]])
def test_an_unreadable_text_is_named_in_the_error(tokenizer: str, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError, match=r"a\.txt is not a readable text"):
        tokens_of(tokenizer, tmp_path / "a.txt", data)


@pytest.mark.parametrize("json", ["", "{}", "no json"])
def test_an_unusable_tokenizer_is_one_clear_line(json: str) -> None:
    with pytest.raises(BundleError, match=r"^the model's tokenizer cannot be read: [^\n]+$"):
        reader_for(PREPROCESSING, json)


def test_without_the_package_the_error_names_it(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="pip install tokenizers"):
        reader_for(PREPROCESSING, tokenizer)
