"""A bundle's preprocessing is that of transformers' image processor beside the weights, on photos of usual sizes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.bundles import IMAGE_SIZE, build, relative_error, run_graph
from transformers import AutoImageProcessor

from edge_runtime.data.inputs import reader_for, reader_of
from export.image_processor import FILES, Processor, read_processor
from export.reference import normalize_pixels
from export.weights import load_backbone
from fedfmsl.common.whole_folder import write_folder
from fedfmsl.errors import WeightsError
from fedfmsl.protocol.bundle import ImagePreprocessing
from trainer_server.storage.peft_adapter import adapter_files

RAW = {"do_rescale": False, "image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}
SQUARE = {"height": 48, "width": 48}
PROCESSORS: dict[str, dict[str, Any]] = {
    "the defaults of ViT": {"image_processor_type": "ViTImageProcessor"},
    "the defaults of DeiT": {"image_processor_type": "DeiTImageProcessor"},
    "the defaults of CLIP": {"feature_extractor_type": "CLIPFeatureExtractor"},
    "the defaults of DINOv2": {"image_processor_type": "BitImageProcessor"},
    "no type": {"size": 48, "image_mean": [0.1, 0.2, 0.3]},
    "mean up to 255": {**RAW, "size": SQUARE},
    "rescale_factor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3, "size": 48},
    "no normalization": {"do_normalize": False, "size": 48},
    "neither": {"do_normalize": False, "do_rescale": False, "size": 48},
    "one mean": {"image_mean": 0.4, "image_std": 0.3, "size": 48},
    "nearest": {"resample": 0, "size": 48},
    "lanczos": {"resample": 1, "size": 48},
    "hamming": {"resample": 5, "size": 48},
    "crop": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 56}, "crop_size": 41},
    "square and crop": {"image_processor_type": "DeiTImageProcessor", "size": 57, "crop_size": 48, "resample": 4},
}
# Crops and colour of the graphs are exact for a PNG. A JPEG is decoded smaller: grey levels, mean over its pixels.
EXACT = 2e-6
JPEG_LEVELS = 2.0


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A landscape and a portrait photo of odd sizes, with smooth light, edges and grain."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(5)
    paths = []
    for width, height in ((1333, 1001), (1003, 1500)):
        y, x = np.mgrid[:height, :width]
        light = 128 + 90 * np.sin(x[..., None] / (170, 230, 310)) * np.cos(y[..., None] / 210)
        edges = 60 * ((x // 97 + y // 131) % 2)[..., None]
        grain = rng.normal(0, 6, (height, width, 3))
        paths.append(folder / f"{width}.png")
        Image.fromarray(np.clip(light + edges + grain, 0, 255).astype(np.uint8)).save(paths[-1], compress_level=0)
    return paths


def write(folder: Path, values: object, name: str = FILES[0]) -> Path:
    (folder / name).write_text(json.dumps(values))
    return folder


def theirs(folder: Path, paths: list[Path]) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    return torch.cat([processor(Image.open(path), return_tensors="pt").pixel_values for path in paths]).float()


def ours(preprocessing: ImagePreprocessing, paths: list[Path]) -> torch.Tensor:
    return normalize_pixels(reader_for(preprocessing).batch(paths)["pixels"], preprocessing)


def read(folder: Path) -> Processor:
    processor = read_processor(str(folder), {}, "vit")
    assert processor is not None
    return processor


@pytest.mark.parametrize("values", PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_equal_those_of_the_image_processor(photos: list[Path], tmp_path: Path, values: dict[str, Any]) -> None:
    kinds = {"image_processor_type", "feature_extractor_type"}
    typed = values if kinds & set(values) else {**values, "image_processor_type": "ViTImageProcessor"}
    expected = theirs(write(tmp_path, typed), photos)
    processor = read(write(tmp_path, values))
    found = ours(processor.preprocessing(processor.size), photos)
    assert relative_error(found.numpy(), expected.numpy()) < EXACT


def test_logits_from_photos_equal_those_of_transformers(vit_folder: Path, photos: list[Path], tmp_path: Path) -> None:
    """With a processor that differs from the default in every step. The graphs normalize pixels themselves."""
    folder = shutil.copytree(vit_folder, tmp_path / "copy")
    values = {**RAW, "image_processor_type": "DeiTImageProcessor", "size": 40, "crop_size": IMAGE_SIZE, "resample": 2}
    built = build(write(folder, values), tmp_path / "bundle", levels=1)
    with torch.no_grad():
        expected = built.source.backbone(theirs(folder, photos)).last_hidden_state[:, 0].numpy()
    pixels = reader_of(built.bundle).batch(photos)
    (found,) = run_graph(built.bundle, "features.onnx", ["pooled"], **pixels)
    assert relative_error(found, expected) < 1e-5

    adapter = tmp_path / "adapter"
    write_folder(adapter, adapter_files(built.bundle, built.bundle.initial()[0], 1))
    assert relative_error(theirs(adapter, photos).numpy(), theirs(folder, photos).numpy()) < EXACT


def test_a_jpeg_that_is_decoded_smaller_differs_by_less_than_two_grey_levels(
    photos: list[Path], tmp_path: Path
) -> None:
    processor = read(write(tmp_path, PROCESSORS["no type"] | {"image_mean": 0.0, "image_std": 1.0}))
    Image.open(photos[0]).save(tmp_path / "photo.jpg", quality=90)
    write(tmp_path, {"image_processor_type": "ViTImageProcessor", "size": 48, "image_mean": 0.0, "image_std": 1.0})
    paths = [tmp_path / "photo.jpg"]
    assert float((ours(processor.preprocessing(48), paths) - theirs(tmp_path, paths)).abs().mean()) < JPEG_LEVELS / 255


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_resize": False}, "do_resize False, which a device cannot do"),
        ({"size": {"height": 32, "width": 48}}, "size {'height': 32, 'width': 48}, which"),
        ({"size": {"shortest_edge": 32, "longest_edge": 99}}, "size {'shortest_edge': 32, 'longest_edge': 99}"),
        ({"size": {"shortest_edge": 32}}, "size {'shortest_edge': 32}, which .* without do_center_crop"),
        ({"size": "large"}, "is not valid"),
        ({"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 40}, "crop_size .* larger than"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "without do_center_crop"),
        ({"resample": 9}, "resample 9, which"),
        ({"rescale_factor": "1/255"}, "rescale_factor '1/255', which"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean \[0.5, 0.5\], which"),
        ({"image_std": ["a", "b", "c"]}, r"image_std \['a', 'b', 'c'\], which"),
        ({"image_std": 0}, "image_std 0, which .* must be positive"),
        ({"image_std": 1e-300}, "image_std 1e-300, which .* above 10000 or below 0.0001"),
        ({"image_mean": 10**400}, "image_mean 10{299}, which .* must be a number, or three"),
        ({"rescale_factor": 1e200}, r"rescale_factor 1e\+200, which .* more than 10000 times 1/255"),
        ({"size": 10**12}, "size {'height': 1000000000000, .*of at most 4096 px"),
        ({"resample": 2.0}, "resample 2.0, which"),
        ({"do_normalize": None}, "do_normalize null"),
        ({"do_rescale": "no"}, 'do_rescale "no"; write true or false'),
        ({"do_center_crop": True}, "do_center_crop True, which is not a setting of ViTImageProcessor"),
        ({"crop_pct": 0.9}, "crop_pct 0.9, which is not a setting"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order True, which is not a setting"),
        ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "auto_map {.*}, which is not a setting"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type 'ConvNextImageProcessor'; devices"),
        ([], "has no JSON object"),
    ],
)
def test_what_a_device_cannot_do_is_refused_with_key_and_value(tmp_path: Path, values: object, message: str) -> None:
    place = re.escape(f"{tmp_path}: preprocessor_config.json")
    with pytest.raises(WeightsError, match=f"{place}.*{message}") as caught:
        read(write(tmp_path, values))
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("text", ["", "{"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / FILES[0]).write_text(text)
    with pytest.raises(WeightsError, match=r"preprocessor_config\.json is not JSON"):
        read(tmp_path)


def test_the_file_of_transformers_5_is_read_and_must_agree_with_the_older_one(tmp_path: Path) -> None:
    fast = {"image_processor_type": "ViTImageProcessorFast", "size": SQUARE, "image_mean": 0.1, "crop_size": None}
    write(tmp_path, {"processor_class": "CLIPProcessor"}, FILES[1])
    assert read_processor(str(tmp_path), {}, "vit") is None
    write(tmp_path, {"image_processor": fast, "processor_class": "CLIPProcessor"}, FILES[1])
    assert (read(tmp_path).size, read(tmp_path).mean) == (48, (0.1, 0.1, 0.1))
    read(write(tmp_path, fast))
    with pytest.raises(WeightsError, match="say different things"):
        read(write(tmp_path, {**fast, "image_mean": 0.2}))


def sizes() -> Iterator[Any]:
    stated = {"image_processor_type": "DeiTImageProcessor", "size": 64, "crop_size": 56}
    default = {"image_processor_type": "DeiTImageProcessor"}  # 256 px, of which 224 are kept
    yield pytest.param("dinov2", stated, None, 56, 64, id="the file decides")
    yield pytest.param("dinov2", stated, 112, 112, 128, id="in proportion to --image-size")
    yield pytest.param("vit", stated, IMAGE_SIZE, IMAGE_SIZE, 37, id="the size of the model")
    yield pytest.param("vit", default, None, IMAGE_SIZE, 37, id="no size in the file")


@pytest.mark.parametrize(("name", "values", "asked", "size", "edge"), list(sizes()))
def test_the_size_of_images(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    name: str,
    values: dict[str, Any],
    asked: int | None,
    size: int,
    edge: int,
) -> None:
    folder = write(shutil.copytree(request.getfixturevalue(f"{name}_folder"), tmp_path / "copy"), values)
    preprocessing = load_backbone(str(folder), None, 2, asked).preprocessing
    assert isinstance(preprocessing, ImagePreprocessing)
    assert (preprocessing.size, preprocessing.edge) == (size, edge)


def test_a_crop_of_a_few_pixels_is_not_scaled_without_limit(tmp_path: Path) -> None:
    values = {"image_processor_type": "CLIPImageProcessor", "size": 4096, "crop_size": 1}
    with pytest.raises(WeightsError, match=r"makes 917504 px for 224 px; devices resize to at most 4096 px"):
        read(write(tmp_path, values)).preprocessing(224)


def test_images_of_another_size_than_the_models_are_refused(vit_folder: Path, tmp_path: Path) -> None:
    folder = write(shutil.copytree(vit_folder, tmp_path / "copy"), {"size": 48})
    with pytest.raises(WeightsError, match=r"makes images of 48 px, but the model takes 32 px; .*--image-size 32"):
        load_backbone(str(folder), None, 2)
