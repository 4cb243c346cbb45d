"""The zero-shot head from class names, compared with transformers' CLIP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bundles import FEATURE, IMAGE_SIZE, Built
from support.samples import CLASSES
from support.tiny_models import write_clip
from support.torch_reference import features_of
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection
from typer.testing import CliRunner

from export.build import app
from export.reference import normalize_pixels
from export.task import app as task_app
from export.weights import load_backbone
from export.zero_shot import TEMPLATES, zero_shot_head
from fedfmsl.algorithms.class_means import direction_head
from fedfmsl.errors import ConfigError, WeightsError
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle


def test_probabilities_of_the_zero_shot_head_equal_clips(clip: Built, clip_folder: Path) -> None:
    names = [*CLASSES, "fig", "quince", "sloe", "lime", "banana", "pear", "date", "mango", "grape", "papaya"]
    zero_shot = zero_shot_head(clip.source, names, ["a photo of a {}."])
    colours = np.random.default_rng(1).integers(0, 256, (12, 1, 1, 3), np.uint8)
    pixels = np.tile(colours, (1, IMAGE_SIZE, IMAGE_SIZE, 1))
    features = features_of(clip, pixels)
    units = features / np.linalg.norm(
        features, axis=1, keepdims=True
    )  # norm 1, which is also the mean norm of the head
    head = direction_head(
        zero_shot.rows, zero_shot.scale, counts=np.full(len(names), 3.0, np.float32), norm_sum=3.0 * len(names)
    )
    weight, bias = np.split(head, [zero_shot.rows.size])
    ours = torch.softmax(torch.from_numpy(units @ weight.reshape(zero_shot.rows.shape).T + bias), dim=1).numpy()

    model = CLIPModel.from_pretrained(clip_folder).eval()
    prompts = [f"a photo of a {name}." for name in names]
    tokens = AutoTokenizer.from_pretrained(clip_folder)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(pixel_values=normalize_pixels(pixels, clip.bundle.manifest.preprocessing), **tokens)
    theirs = outputs.logits_per_image.softmax(dim=1).numpy()
    assert np.allclose(ours, theirs, atol=1e-6)
    rankings = theirs.argsort(axis=1)
    assert np.array_equal(ours.argsort(axis=1), rankings)
    assert len(np.unique(rankings, axis=0)) > 1  # the images do not all have the same ranking


def test_prompts_are_averaged_as_directions_and_underscores_are_spaces(clip: Built) -> None:
    templates = ["a photo of a {}.", "the {}", "{}"]
    alone = [zero_shot_head(clip.source, ["red kiwi", "plum"], [template]).rows for template in templates]
    mean = np.mean(alone, axis=0)
    together = zero_shot_head(clip.source, ["red_kiwi", "plum"], templates).rows
    assert np.allclose(together, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_a_prompt_longer_than_the_text_towers_input_is_truncated(clip: Built) -> None:
    assert np.isfinite(zero_shot_head(clip.source, ["plum" * 50, "kiwi"], ["a photo of a {}."]).rows).all()


def test_only_bundles_of_families_with_a_text_tower_have_the_head(clip: Built, vit: Built) -> None:
    zero_shot = clip.bundle.task.zero_shot
    assert zero_shot is not None
    assert zero_shot.rows.shape == (len(CLASSES), FEATURE)
    assert zero_shot.scale == pytest.approx(
        float(CLIPModel.from_pretrained(clip.source.origin.source).logit_scale.detach().exp())
    )
    assert vit.bundle.task.zero_shot is None


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_prompt_without_exactly_one_place_for_the_name_is_refused(clip: Built, template: str) -> None:
    with pytest.raises(ConfigError, match="once, as the place of the class name"):
        zero_shot_head(clip.source, CLASSES, [template])


def test_weights_without_text_tower_or_tokenizer_are_one_clear_error(vit: Built, tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    vision = tmp_path / "vision"
    CLIPVisionModelWithProjection.from_pretrained(folder).save_pretrained(vision)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(folder / file, vision)
    (folder / "vocab.json").unlink()
    for source, message in (
        (vit.source, "no text tower"),
        (load_backbone("clip-vit-b16", "random", 2, None, None, 0), "no text tower"),
        (load_backbone(str(vision), None, 2, None, None, 0), "has no tensor"),
        (load_backbone(str(folder), None, 2, None, None, 0), "no usable tokenizer"),
    ):
        with pytest.raises(WeightsError, match=message):
            zero_shot_head(source, ["a", "b"], ["{}"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_position_embeddings", "77", "config.json has max_position_embeddings '77', not a number"),
        ("eos_token_id", [], "is not a usable transformers folder: "),
    ],
)
def test_a_text_tower_with_a_bad_config_is_one_clear_error(
    clip_folder: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message) as caught:
        zero_shot_head(load_backbone(str(folder), None, 2), ("a", "b"), TEMPLATES)
    assert len(caught.value.lines) == 1


def test_the_command_makes_the_head_from_its_prompts(clip_folder: Path, clip: Built, tmp_path: Path) -> None:
    arguments = ["--model", str(clip_folder), "--levels", "1", "--classes", ",".join(CLASSES)]
    prompts = ["--prompt", "{}", "--prompt", "the {}"]
    result = CliRunner().invoke(app, [*arguments, *prompts, "--out", str(tmp_path / "b")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "zero-shot head" in result.stdout
    zero_shot = TaskBundle.load(tmp_path / "b").task.zero_shot
    assert zero_shot is not None
    assert np.array_equal(zero_shot.rows, zero_shot_head(clip.source, CLASSES, ["{}", "the {}"]).rows)


def test_a_task_made_after_the_export_is_that_of_the_export(
    clip_folder: Path, clip: Built, vit: Built, tmp_path: Path
) -> None:
    arguments = ["--bundle", str(clip.bundle.root), "--out", str(tmp_path / "task"), "--classes", ",".join(CLASSES)]
    result = CliRunner().invoke(task_app, [*arguments, "--weights", str(clip_folder)], catch_exceptions=False)
    assert result.exit_code == 0 and "with a zero-shot head" in result.stdout, result.output
    assert Task.read(tmp_path / "task").sha256 == clip.bundle.task.sha256
    weights = ["--weights", str(clip_folder)]
    other = write_clip(tmp_path / "other", seed=1)
    with pytest.raises(WeightsError, match=f"{other} has other weights than the bundle at {clip.bundle.root}"):
        CliRunner().invoke(task_app, [*arguments, "--weights", str(other)], catch_exceptions=False)
    for options, message in (
        ([], "weights of tiny-clip are not on the hub"),
        ([*weights, "--prompt", "a"], "once, as the place"),
        (["--weights", str(clip_folder / "nowhere")], "--weights .*nowhere is not a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(task_app, [*arguments, *options], catch_exceptions=False)
    for option in ("--prompt", "--weights"):
        arguments[1] = str(vit.bundle.root)
        with pytest.raises(ConfigError, match=f"{option} needs a text tower"):
            CliRunner().invoke(task_app, [*arguments, option, "{}"], catch_exceptions=False)


def test_a_vision_tower_alone_gives_the_same_weights(clip: Built, tmp_path: Path) -> None:
    vision = tmp_path / "tiny-clip"
    CLIPVisionModelWithProjection.from_pretrained(clip.source.origin.source).save_pretrained(vision)
    source = load_backbone(str(vision), None, len(CLASSES), None, None, 0)
    assert source.family is clip.source.family
    weights = [each.family.weights(each.model, each.size) for each in (source, clip.source)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])
