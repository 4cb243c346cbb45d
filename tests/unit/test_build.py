"""python -m export.build: valid and invalid options, and the files of a bundle."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.bundles import IMAGE_SIZE, LAYERS, RANK, Built, build, random_samples, relative_error, run_graph
from support.samples import CLASSES
from support.tiny_models import write_vit
from transformers import AutoModel, GPT2Config, ViTConfig
from typer.testing import CliRunner

from export import parity
from export.build import app
from export.bundle import build_bundle
from export.class_options import class_names
from export.families.family import Family
from export.families.vit import VIT
from export.graph import OPSET
from export.graphs import lora_layout
from export.models import MODELS, ModelSpec
from export.parity import check_parity
from export.pipeline import Options, export_bundle
from export.reference import normalize_pixels
from export.weights import load_backbone
from fedfmsl.common.onnx_runtime import has_ort_training
from fedfmsl.errors import BundleError, ConfigError, InputError, WeightsError
from fedfmsl.protocol.bundle import MANIFEST
from fedfmsl.protocol.class_names import write_names
from fedfmsl.protocol.layout import expert_layout
from fedfmsl.protocol.task import TASK
from fedfmsl.protocol.task_bundle import TaskBundle

ROOT = Path(__file__).parents[2]


def test_two_builds_are_byte_identical(vit: Built, vit_folder: Path, tmp_path: Path) -> None:
    again = build(vit_folder, tmp_path / "again", classes=("fig", "quince")).bundle
    assert again.sha256 == vit.bundle.sha256 and again.classes != vit.bundle.classes
    assert again.features_key == vit.bundle.features_key  # so cached features serve every task
    assert build(vit_folder, tmp_path / "other", seed=1).bundle.sha256 != vit.bundle.sha256


@pytest.mark.ort_training
def test_a_build_in_a_new_process_from_a_copy_of_the_weights_is_identical(clip_folder: Path, tmp_path: Path) -> None:
    """A bundle does not depend on paths, on the order of sets or on the number of threads."""

    def arguments(name: str) -> list[str]:
        copy = shutil.copytree(clip_folder, tmp_path / name / "weights" / "clip")
        options = ["--classes", "fig,plum,kiwi", *(["--ort-training"] if has_ort_training() else [])]
        return ["--model", str(copy), "--out", str(tmp_path / name / "out"), *options]

    here = CliRunner().invoke(app, arguments("here"))  # its order of sets is random
    assert here.exit_code == 0, (here.output, here.exception)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "export.build", *arguments("there")]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert there.returncode == 0, there.stderr
    bundles = [TaskBundle.load(tmp_path / name / "out") for name in ("here", "there")]
    assert bundles[0].sha256 == bundles[1].sha256
    assert bundles[0].task.zero_shot is not None


def test_frozen_weights_are_stored_once_for_all_levels(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "wide", hidden_size=384, num_hidden_layers=2, intermediate_size=1536)
    manifest = build(folder, tmp_path / "bundle").bundle.manifest
    assert manifest.levels == 2
    assert sum(entry.size for entry in manifest.files.values()) <= 1.05 * 4 * manifest.backbone_parameters


@pytest.mark.ort_training
def test_the_bundle_has_every_file_of_its_docstring_and_only_standard_operators(built: Built) -> None:
    bundle, levels = built.bundle, range(1, LAYERS + 1)
    graphs = {"backbone", "features", "gate-step", "gate-predict", *(f"lift-{block}" for block in range(LAYERS - 1))}
    graphs |= {f"{kind}-{level}" for kind in ("step", "predict", "personal") for level in levels}
    names = {f"{graph}.onnx" for graph in graphs}
    others = {"backbone.weights", "init.safetensors"} | ({"tokenizer.json"} if bundle.tokenizer() else set())
    if has_ort_training():
        others |= {f"ort-training-{level}.{kind}" for level in levels for kind in ("onnx", "checkpoint")}
        others |= {"ort-training-optimizer.onnx"}
    assert set(bundle.manifest.files) == names | others
    assert {path.name for path in bundle.root.iterdir()} == {*bundle.manifest.files, "manifest.json", TASK}
    for name in names:
        model = onnx.load(str(bundle.path(name)), load_external_data=False)
        assert {opset.domain for opset in model.opset_import} == {""}
        assert max(opset.version for opset in model.opset_import) <= OPSET
        assert not model.functions


def test_the_manifest_counts_backbone_and_trainables(built: Built) -> None:
    manifest = built.bundle.manifest
    lora = LAYERS * 2 * 2 * RANK * 32
    model, head = built.source.model, manifest.dims.feature * 4 + 4
    assert manifest.backbone_parameters == sum(
        p.numel() for p in (set(model.parameters()) - set(model.classifier.parameters()))
    )
    assert built.bundle.tuned_parameters == built.bundle.initial()[0].size == head + lora
    assert built.bundle.tuned_share == built.bundle.tuned_parameters / manifest.backbone_parameters


def test_the_initial_expert_has_initial_lora_of_peft_and_a_zero_head(built: Built) -> None:
    parts = built.bundle.expert.split(built.bundle.initial()[0])
    for name, part in parts.items():
        assert np.any(part) == ("lora_A" in name), name


def test_vit_b16_with_a_hundred_classes_tunes_less_than_a_third_of_a_percent() -> None:
    config = ViTConfig(**MODELS["vit-b16"].config)
    with torch.device("meta"):
        backbone = AutoModel.from_config(config, add_pooling_layer=False)
    geometry = VIT.geometry(config, 224)
    layout = expert_layout(100, geometry.feature, lora_layout(VIT, geometry, rank=4))
    assert layout.size(12) - layout.size(0) == 147_456  # the number in the paper
    assert layout.total / sum(p.numel() for p in backbone.parameters()) < 0.003


def test_fewer_levels_give_the_same_graphs_and_a_shorter_layout(vit: Built, vit_folder: Path, tmp_path: Path) -> None:
    low = build(vit_folder, tmp_path / "low", levels=1).bundle
    assert low.manifest.levels == 1
    assert low.expert.total == vit.bundle.expert.size(1)
    assert np.array_equal(low.initial()[0], vit.bundle.initial()[0][: low.expert.total])
    pixels = random_samples(vit, 2, seed=0)
    ours, theirs = (run_graph(b, "features.onnx", ["hidden_1"], pixels=pixels)[0] for b in (low, vit.bundle))
    assert np.array_equal(ours, theirs)


def test_a_backbone_without_qkv_bias_is_exported_correctly(tmp_path: Path) -> None:
    built = build(write_vit(tmp_path / "weights", qkv_bias=False), tmp_path / "bundle")
    pixels = random_samples(built, 2, seed=3)
    with torch.no_grad():
        expected = built.source.backbone(pixel_values=normalize_pixels(pixels, built.bundle.manifest.preprocessing))
    (pooled,) = run_graph(built.bundle, "features.onnx", ["pooled"], pixels=pixels)
    assert relative_error(pooled, expected.last_hidden_state[:, 0].numpy()) < 1e-5


def test_the_parity_check_finds_slightly_wrong_weights(vit: Built, tmp_path: Path) -> None:
    assert check_parity(vit.bundle, vit.source, LAYERS, seed=1).gradient < parity.TOLERANCE["fp32"]
    shutil.copytree(vit.bundle.root, tmp_path / "bundle")
    weights = tmp_path / "bundle" / "backbone.weights"
    raw = np.frombuffer(weights.read_bytes(), np.float32).copy()
    raw[:1000] *= 1.01
    weights.write_bytes(raw.tobytes())
    with pytest.raises(BundleError, match="differ from torch"):
        check_parity(TaskBundle.load(tmp_path / "bundle"), vit.source, LAYERS, seed=1)


def test_the_parity_check_finds_a_gradient_that_is_not_finite(vit: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    run = parity._run

    def overflow(bundle: TaskBundle, name: str, outputs: list[str], **inputs: np.ndarray) -> list[np.ndarray]:
        found = run(bundle, name, outputs, **inputs)
        return [array * np.nan if each == "gradient" else array for each, array in zip(outputs, found, strict=True)]

    monkeypatch.setattr(parity, "_run", overflow)
    with pytest.raises(BundleError, match="differ from torch"):
        check_parity(vit.bundle, vit.source, 1, seed=1)


def without(name: str) -> Callable[[Family], Family]:
    """A family without a canonical weight outside the blocks."""

    def change(family: Family) -> Family:
        def outer(model: Any, size: int) -> dict[str, Any]:
            return {key: array for key, array in family.outer(model, size).items() if key != f"{name}.weight"}

        return replace(family, outer=outer)

    return change


def of_keys(**keys: str | None) -> Callable[[Family], Family]:
    """A family with other keys for weights of a block. None removes a weight."""

    def change(family: Family) -> Family:
        changed = {**family.block_keys, **keys}
        return replace(family, block_keys={name: key for name, key in changed.items() if key is not None})

    return change


def of_geometry(**fields: Any) -> Callable[[Family], Family]:
    return lambda family: replace(family, geometry=lambda *arguments: replace(family.geometry(*arguments), **fields))


def without_distillation_token(family: Family) -> Family:
    def outer(model: Any, size: int) -> dict[str, Any]:
        weights = family.outer(model, size)
        weights["position"][:, 1] = weights["position"][:, 2]
        return weights

    return replace(family, outer=outer)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("vit", of_keys(norm1="layernorm_after", norm2="layernorm_before"), id="norms swapped"),
        pytest.param("vit", of_keys(query="attention.attention.key"), id="key for query"),
        pytest.param("vit", of_geometry(norm_eps=1e-3), id="norm_eps"),
        pytest.param("vit", of_geometry(norm="post"), id="norm after"),
        pytest.param("deit", without_distillation_token, id="a special token"),
        pytest.param("dinov2", of_keys(scale2=None), id="no layer scale"),
        pytest.param("clip", of_geometry(activation="gelu"), id="activation"),
        pytest.param("clip", without("embed_norm"), id="no norm after the embeddings"),
        pytest.param("clip", without("norm"), id="no last norm"),
    ],
)
def test_a_wrong_family_fails_the_build(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, wrong: Callable[[Family], Family]
) -> None:
    right: Built = request.getfixturevalue(name)
    source = replace(right.source, family=wrong(right.source.family))
    with pytest.raises(BundleError, match="this model cannot be exported"):
        list(build_bundle(source, 1, source.family.lora(RANK), tmp_path / "out", 0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ("3", ("class-0", "class-1", "class-2")),
        ("cat, dog", ("cat", "dog")),
        ('"tench, Tinca tinca",goldfish', ("tench, Tinca tinca", "goldfish")),
        ('" cat",c\u0327a', (" cat", "\u00e7a")),
    ],
)
def test_class_names_from_a_number_or_a_list(classes: str, names: tuple[str, ...]) -> None:
    assert class_names(classes, None, None) == names


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("0", "--classes 0 needs at least two classes, got 0"),
        ("9" * 5000, "--classes 999999999999… is more than 4096 classes"),  # Python refuses the number itself
        ("4097", "--classes 4097: 4097 classes are more than 4096; name fewer"),
        ("cat", "needs at least two classes, got 1"),
        ("cat,cat", "class 'cat' is named twice"),
        ("c\u0327a,\u00e7a", "class '\u00e7a' is named twice"),
        ("cat,,dog", "class '' has no letters"),
        ("", "needs at least two classes, got 0"),
        ('cat,"dog', "is not a list of names"),
        ("cat,unknown", "class 'unknown' has the name that predictions use"),
        ("cat,../x", r"class '\.\./x' has the path \.\. in it"),
        ('cat,"a\nb"', r"class 'a\\nb' has a control character"),
        ("cat,\u202egod", r"class '\\u202egod' has a character that turns the direction of the text"),
        ("cat,\udcc4pfel", r"class '\\udcc4pfel' is not UTF-8"),
        (f"cat,{'x' * 10_000}", f"class '{'x' * 60}…' has 10000 bytes; use at most 255$"),
        ("²", "needs at least two classes, got 1"),  # a digit, but no number
    ],
)
def test_class_names_that_are_not_valid_are_refused_in_one_line(classes: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        class_names(classes, None, None)
    assert "\n" not in str(caught.value)


def test_class_names_from_the_subfolders_of_a_folder(photos: Path, tmp_path: Path) -> None:
    assert class_names(None, photos, None) == CLASSES
    with pytest.raises(InputError, match=r"--classes-from folder .*nowhere does not exist"):
        class_names(None, tmp_path / "nowhere", None)


def test_thousands_of_class_names_come_from_a_file(tmp_path: Path) -> None:
    names = tuple(f"{index:05} {'Annelida, ' * 9}" for index in range(2500))
    write_names(tmp_path / "classes.txt", names)
    assert class_names(None, None, tmp_path / "classes.txt") == names
    (tmp_path / "latin.txt").write_bytes(b"\xc4pfel\nplum\n")
    with pytest.raises(InputError, match=r"--classes-file .*latin\.txt cannot be read \(not UTF-8\)"):
        class_names(None, None, tmp_path / "latin.txt")


def test_the_error_for_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        load_backbone("resnet-50", None, 4, None, None, 0)
    assert all(name in str(caught.value) for name in MODELS)


def test_weights_of_another_type_are_refused(vit_folder: Path, tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    for model, weights in (("vit-b16", tmp_path), (str(tmp_path), None), ("dinov2-s14", vit_folder)):
        with pytest.raises(WeightsError, match=r"has a model of type '(gpt2|vit)', expected"):
            load_backbone(model, str(weights) if weights else None, 4, None, None, 0)


def change_config(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": [32, 48]}, r"image_size \[32, 48\]; only square"),
        ({"image_size": "32"}, "image_size '32'; only square"),
        ({"patch_size": [8, 4]}, r"patch_size \[8, 4\]; only square"),
        ({"patch_size": None}, "patch_size None; only square"),
        ({"num_channels": 1}, "num_channels 1, but devices read images of 3"),
    ],
)
def test_a_config_of_other_images_than_square_rgb_is_refused(
    vit_folder: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    folder = change_config(shutil.copytree(vit_folder, tmp_path / "copy"), **values)
    with pytest.raises(WeightsError, match=message):
        load_backbone(str(folder), None, 4)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_act": "banana"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ],
)
def test_a_config_that_transformers_fails_on_is_one_clear_error(
    vit_folder: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = change_config(shutil.copytree(vit_folder, tmp_path / "copy"), **values)
    with pytest.raises(WeightsError, match=f"^{re.escape(str(folder))} is not a usable transformers folder: .*$"):
        load_backbone(str(folder), None, 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("layer_norm_eps", value) for value in ("1e-12", math.nan, -1e-12, 0, 1e30, None)),
        *(("initializer_range", value) for value in ("0.02", math.inf)),
        *(("num_hidden_layers", value) for value in ("three", 0, -1, 2.0, 10**9)),
        *(("hidden_size", value) for value in (True, 10**30)),
        *(("num_attention_heads", value) for value in (0, [2])),
        *(("intermediate_size", 10**12), ("patch_size", 10**9), ("image_size", 10**9)),
    ],
)
@pytest.mark.parametrize("weights", [None, "random"])
def test_numbers_of_a_config_that_no_model_has_are_refused(
    vit_folder: Path, tmp_path: Path, key: str, value: Any, weights: str | None
) -> None:
    folder = change_config(shutil.copytree(vit_folder, tmp_path / "copy"), **{key: value})
    message = f"^{re.escape(str(folder))}: config.json has {key} .*, not a number "
    with pytest.raises(WeightsError, match=message) as caught:
        load_backbone(str(folder), weights, 4)
    assert len(str(caught.value)) < len(str(folder)) + 200


@pytest.mark.parametrize("value", ["0", -1, 32, None, 1e300])
def test_a_padding_token_outside_of_the_vocabulary_is_refused(bert_folder: Path, tmp_path: Path, value: Any) -> None:
    folder = change_config(shutil.copytree(bert_folder, tmp_path / "copy"), pad_token_id=value)
    with pytest.raises(WeightsError, match=r"config.json has pad_token_id .*, not a token from 0 to 31"):
        load_backbone(str(folder), None, 4)


def test_random_weights_of_a_config_that_transformers_fails_on_are_one_clear_error(
    vit_folder: Path, tmp_path: Path
) -> None:
    folder = change_config(shutil.copytree(vit_folder, tmp_path / "copy"), num_attention_heads=5)
    with pytest.raises(WeightsError, match="is not a usable transformers folder"):
        load_backbone(str(folder), "random", 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 100_000}, "--rank 100000 is more than the hidden size 32 of tiny-vit"),
        ({"image_size": IMAGE_SIZE * 2}, "takes images of 32 px only, not --image-size 64; omit --image-size"),
        ({"levels": LAYERS + 1}, "--levels 4 is more than the 3 blocks"),
        ({"max_tokens": 8}, "--max-tokens and --tokenizer are not valid for the vision model"),
        ({"precision": "int8"}, "holds another bundle"),
    ],
)
def test_what_a_model_cannot_take_is_refused_before_its_weights_are_fetched(
    vit: Built, vit_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(vit_folder, tmp_path / vit_folder.name)
    (folder / "model.safetensors").write_bytes(b"")  # reading it would fail
    options = Options(
        model=str(folder),
        weights=None,
        classes=CLASSES,
        levels=1,
        image_size=None,
        max_tokens=None,
        tokenizer=None,
        rank=4,
        precision="fp32",
        ort_training=False,
        fp16=False,
        prompts=None,
        revision=None,
        out=vit.bundle.root if "precision" in change else tmp_path / "out",
        seed=0,
    )
    with pytest.raises(ConfigError, match=message):
        export_bundle(replace(options, **change))


def test_sizes_of_a_config_may_be_lists(vit: Built, vit_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vit_folder, tmp_path / vit_folder.name)
    change_config(folder, image_size=[IMAGE_SIZE, IMAGE_SIZE], patch_size=[8, 8])
    assert build(folder, tmp_path / "bundle").bundle.sha256 == vit.bundle.sha256


def test_a_named_model_takes_the_image_size_of_its_weights(vit_folder: Path) -> None:
    source = load_backbone("vit-b16", str(vit_folder), 4)
    assert source.size == IMAGE_SIZE
    assert source.origin and source.origin.base == vit_folder.name  # these weights are of another model


def test_a_copy_of_weights_on_the_hub_has_the_name_of_their_repository(
    vit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((vit_folder / "config.json").read_text())
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    spec = ModelSpec("org/name", "vit", {key: config[key] for key in keys})
    monkeypatch.setitem(MODELS, "tiny", spec)
    source = load_backbone("tiny", str(vit_folder), 4)
    assert source.origin and (source.origin.base, source.origin.commit) == ("org/name", None)
    snapshot = shutil.copytree(vit_folder, tmp_path / "models--other--vit-tiny" / "snapshots" / ("a1" * 20))
    source = load_backbone(str(snapshot), None, 4)
    assert source.origin and (source.origin.base, source.origin.commit) == ("other/vit-tiny", "a1" * 20)


def test_an_adapter_a_pointer_and_values_that_are_not_finite_are_refused(vit_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vit_folder, tmp_path / "copy")
    adapter, weights = folder / "adapter_config.json", folder / "model.safetensors"
    adapter.write_text("{}")
    with pytest.raises(WeightsError, match="merge the PEFT adapter"):
        load_backbone(str(folder), None, 4)
    adapter.unlink()
    tensors = load_file(weights)
    tensors["vit.layernorm.weight"][3] = np.nan
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"tensor 'vit\.layernorm\.weight' has values that are not finite"):
        load_backbone(str(folder), None, 4)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 345000000\n")
    with pytest.raises(WeightsError, match=r"model\.safetensors is a Git LFS pointer, .*; run git lfs pull"):
        load_backbone(str(folder), None, 4)


def test_wrong_arguments_are_found_without_torch(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from export.build import app; app()"
    result = subprocess.run(
        [sys.executable, "-c", code, "--model", "nope"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr.count("\n")) == (ConfigError.exit_code, 1)
    assert "--model 'nope'" in result.stderr


@pytest.mark.parametrize(
    "damage", ["no config", "no weights", "a folder", "truncated", "a tensor missing", "a tensor reshaped"]
)
def test_an_incomplete_weights_folder_is_one_clear_error(vit_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(vit_folder, tmp_path / "copy")
    weights = folder / "model.safetensors"
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "a folder":
        weights.unlink()
        weights.mkdir()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "a tensor missing":
        change_config(folder, num_hidden_layers=LAYERS + 1)
    else:
        change_config(folder, intermediate_size=80)
    with pytest.raises(WeightsError, match=re.escape(str(folder))):
        load_backbone(str(folder), None, 4, None, None, 0)


@pytest.mark.parametrize(
    ("size", "levels", "message"),
    [
        (IMAGE_SIZE + 1, None, "not a multiple of the patch size"),
        (IMAGE_SIZE * 2, None, "takes images of 32 px only, .*; omit --image-size"),
        (IMAGE_SIZE, LAYERS + 1, "more than the 3 blocks of the model"),
    ],
)
def test_invalid_sizes_and_levels_are_refused(
    vit_folder: Path, tmp_path: Path, size: int, levels: int | None, message: str
) -> None:
    source = load_backbone(str(vit_folder), None, 4, size, None, 0)
    with pytest.raises(ConfigError, match=message):
        list(build_bundle(source, levels, source.family.lora(RANK), tmp_path / "out", 0))
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_a_server_or_device_may_use_is_never_overwritten(
    vit: Built, vit_folder: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(vit.bundle.root, tmp_path / "out")
    before = {path: path.stat().st_ino for path in out.iterdir()}
    assert build(vit_folder, out).bundle.sha256 == vit.bundle.sha256  # the same content: nothing to do
    for change in ({"seed": 1}, {"levels": 1}):
        with pytest.raises(ConfigError, match=r"out holds another bundle, .*; choose another --out, or delete"):
            build(vit_folder, out, **change)
    assert {path: path.stat().st_ino for path in out.iterdir()} == before
    (out / MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match=r"holds a bundle that cannot be read .*; choose another folder"):
        build(vit_folder, out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_not_a_bundle_is_never_overwritten(vit_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    source = load_backbone(str(vit_folder), None, 4, None, None, 0)
    with pytest.raises(ConfigError, match="is not a bundle"):
        list(build_bundle(source, 1, source.family.lora(RANK), tmp_path, 0))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
