"""python -m export.build with text models: options, tokenizer and preprocessing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.bundles import MAX_TOKENS, RANK, Built
from support.tiny_models import write_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from export.build import app
from export.bundle import build_bundle
from export.weights import load_backbone
from fedfmsl.errors import BundleError, ConfigError, FedFMSLError, WeightsError
from fedfmsl.protocol.bundle import Bundle, TextPreprocessing


def test_a_text_bundle_has_tokenizer_and_preprocessing(bert: Built, bert_folder: Path) -> None:
    assert bert.bundle.manifest.preprocessing == TextPreprocessing(max_tokens=MAX_TOKENS, pad_id=0)
    assert bert.bundle.tokenizer() == (bert_folder / "tokenizer.json").read_text()
    assert bert.bundle.manifest.dims.tokens == MAX_TOKENS


def test_an_image_bundle_has_no_tokenizer(vit: Built) -> None:
    assert vit.bundle.tokenizer() == ""


def test_the_features_key_depends_on_the_tokenizer(bert: Built, tmp_path: Path) -> None:
    root = shutil.copytree(bert.bundle.root, tmp_path / "bundle")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"]["sha256"] = "0" * 64
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert Bundle.load(root).features_key != bert.bundle.features_key


def test_a_bundle_without_its_tokenizer_is_one_clear_error(bert: Built, tmp_path: Path) -> None:
    root = shutil.copytree(bert.bundle.root, tmp_path / "bundle")
    (root / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is not readable"):
        Bundle.load(root).tokenizer()


def test_an_unnamed_model_has_as_many_tokens_as_positions(bert_folder: Path) -> None:
    assert load_backbone(str(bert_folder), None, 4, None, None, 0).size == MAX_TOKENS + 4


def test_random_weights_need_a_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="random weights have no tokenizer; pass --tokenizer FILE"):
        load_backbone("minilm-l6", "random", 4, None, None, 0)
    path = write_tokenizer(tmp_path / "mine.json")
    source = load_backbone("minilm-l6", "random", 4, None, None, 0, path)
    assert source.tokenizer == path.read_text()
    assert source.size == 128
    assert round(source.parameters / 1e6, 1) == 22.7


@pytest.mark.parametrize("case", ["none", "no json", "of another model"])
def test_an_unusable_tokenizer_is_one_clear_error(bert_folder: Path, tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(bert_folder, tmp_path / "copy")
    path = folder / "tokenizer.json"
    if case == "none":
        path.unlink()
        message = "copy has no tokenizer.json; pass --tokenizer FILE"
    elif case == "no json":
        path.write_text("[CLS]")
        message = "is not a tokenizer.json"
    else:
        Tokenizer(WordLevel({f"word{i}": i for i in range(33)}, unk_token="word0")).save(str(path))
        message = "has 33 tokens, but the model has 32"
    with pytest.raises(WeightsError, match=message):
        load_backbone(str(folder), None, 4, None, None, 0)


def test_more_tokens_than_positions_are_refused(bert_folder: Path, tmp_path: Path) -> None:
    source = load_backbone(str(bert_folder), None, 4, MAX_TOKENS + 5, None, 0)
    with pytest.raises(ConfigError, match=f"--max-tokens {MAX_TOKENS + 5} is more than the 16 positions"):
        list(build_bundle(source, 1, source.family.lora(RANK), tmp_path / "out", 0))


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("bert_folder", ["--image-size", "32"], "--image-size is not valid for the text model tiny-bert"),
        (
            "vit_folder",
            ["--max-tokens", "32"],
            "--max-tokens and --tokenizer are not valid for the vision model tiny-vit",
        ),
    ],
)
def test_options_for_the_other_kind_of_input_are_refused(
    request: pytest.FixtureRequest, folder: str, options: list[str], message: str
) -> None:
    model = str(request.getfixturevalue(folder))
    result = CliRunner().invoke(app, ["--model", model, "--classes", "4", *options])
    assert isinstance(result.exception, FedFMSLError)
    assert message in str(result.exception)
