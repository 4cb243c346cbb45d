"""What python -m export.build wants to know of a text model, and what it puts into its bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.bundles import MAX_TOKENS, RANK, Built
from support.samples import CLASSES
from support.tiny_models import write_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from export.build import app, build_bundle
from export.weights import load_backbone
from fedfmsl.errors import BundleError, ConfigError, FedFMSLError, WeightsError
from fedfmsl.protocol.bundle import Bundle, TextPreprocessing


def test_a_text_bundle_says_how_to_read_a_text(bert: Built, bert_folder: Path) -> None:
    assert bert.bundle.manifest.preprocessing == TextPreprocessing(max_tokens=MAX_TOKENS, pad_id=0)
    assert bert.bundle.tokenizer() == (bert_folder / "tokenizer.json").read_text()
    assert bert.bundle.manifest.dims.tokens == MAX_TOKENS


def test_an_image_bundle_has_no_tokenizer(vit: Built) -> None:
    assert vit.bundle.tokenizer() == ""


def test_the_features_key_follows_the_tokenizer(bert: Built, tmp_path: Path) -> None:
    root = shutil.copytree(bert.bundle.root, tmp_path / "bundle")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"]["sha256"] = "0" * 64
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert Bundle.load(root).features_key != bert.bundle.features_key


def test_a_bundle_that_has_lost_its_tokenizer_is_one_clear_error(bert: Built, tmp_path: Path) -> None:
    root = shutil.copytree(bert.bundle.root, tmp_path / "bundle")
    (root / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is not readable"):
        Bundle.load(root).tokenizer()


def test_a_model_without_a_name_takes_as_many_tokens_as_it_has_positions(bert_folder: Path) -> None:
    assert load_backbone(str(bert_folder), None, 4, None, None, 0).size == MAX_TOKENS + 4


def test_random_weights_want_a_tokenizer_and_take_the_one_that_is_given(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="random weights bring no tokenizer; add --tokenizer FILE"):
        load_backbone("minilm-l6", "random", 4, None, None, 0)
    given = write_tokenizer(tmp_path / "mine.json")
    source = load_backbone("minilm-l6", "random", 4, None, None, 0, given)
    assert source.tokenizer == given.read_text()
    assert source.size == 128
    assert round(source.parameters / 1e6, 1) == 22.7


@pytest.mark.parametrize("case", ["none", "no json", "of another model"])
def test_a_tokenizer_that_does_not_serve_is_one_clear_error(bert_folder: Path, tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "copy")
    path = folder / "tokenizer.json"
    if case == "none":
        path.unlink()
        message = "copy has no tokenizer.json; add --tokenizer FILE"
    elif case == "no json":
        path.write_text("[CLS]")
        message = "is not a tokenizer.json"
    else:
        Tokenizer(WordLevel({f"word{i}": i for i in range(33)}, unk_token="word0")).save(str(path))
        message = "knows 33 tokens, the model only 32"
    with pytest.raises(WeightsError, match=message):
        load_backbone(str(folder), None, 4, None, None, 0)


def test_more_tokens_than_positions_are_refused(bert_folder: Path, tmp_path: Path) -> None:
    source = load_backbone(str(bert_folder), None, 4, MAX_TOKENS + 5, None, 0)
    with pytest.raises(ConfigError, match=f"--max-tokens {MAX_TOKENS + 5} is more than the model's"):
        list(build_bundle(source, CLASSES, 1, source.family.lora(RANK), tmp_path / "out", 0))


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("bert_folder", ["--image-size", "32"], "--image-size does not go with tiny-bert, which reads texts"),
        ("vit_folder", ["--max-tokens", "32"], "--max-tokens and --tokenizer do not go with tiny-vit"),
    ],
)
def test_options_of_the_other_kind_are_refused(
    request: pytest.FixtureRequest, folder: str, options: list[str], message: str
) -> None:
    model = str(request.getfixturevalue(folder))
    result = CliRunner().invoke(app, ["--model", model, "--classes", "4", *options])
    assert isinstance(result.exception, FedFMSLError)
    assert message in str(result.exception)
