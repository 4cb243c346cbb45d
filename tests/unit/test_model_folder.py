"""The folder of a personalized model in Optimum and transformers: the probabilities of predict, on real files."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from optimum.onnxruntime import ORTModelForImageClassification, ORTModelForSequenceClassification
from PIL import Image
from support.bundles import IMAGE_SIZE, Built
from support.in_process_daemon import make_daemon
from support.personal_models import globals_of, round_of
from support.samples import CLASSES
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

from edge_runtime.commands import personalize
from edge_runtime.inference.classifier import FileClassifier
from edge_runtime.inference.export_onnx import write_model
from edge_runtime.inference.model_folder import write_model_folder
from edge_runtime.store import DeviceStore
from edge_runtime.training.model import save_personal_model
from fedfmsl.errors import BundleError, ConfigError
from fedfmsl.protocol.bundle import MANIFEST, Bundle
from fedfmsl.protocol.messages import Stage
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle


@dataclass(frozen=True)
class Written:
    """A device's model as a folder and as one file, and some samples of the device."""

    folder: Path
    file: FileClassifier
    samples: list[Path]
    store: DeviceStore
    bundle: Path


@pytest.fixture
def written(built: Built, photos: Path, texts: Path, tmp_path: Path) -> Written:
    samples, bundle = photos, tmp_path / "bundle"
    shutil.copytree(built.bundle.root, bundle)
    if built.bundle.manifest.family == "bert":
        samples = texts
    else:  # as if an image processor had been beside the weights
        manifest = json.loads((bundle / MANIFEST).read_text())
        manifest["preprocessing"]["resize"] = {"edge": IMAGE_SIZE + 5, "keep_ratio": True, "filter": "bilinear"}
        (bundle / MANIFEST).write_text(json.dumps(manifest))
    opened = Bundle.load(bundle)
    task = Task.of(opened.sha256, built.bundle.classes, "the test")
    device = make_daemon(replace(built, bundle=TaskBundle(opened, task)), samples, tmp_path).device
    save_personal_model(device, round_of(Stage.GLOBAL), globals_of(built))
    write_model_folder(device.store, tmp_path / "folder", bundle)
    write_model(device.store, tmp_path / "model.onnx", bundle)
    some = sorted(samples.rglob("*.*"))[::5]
    return Written(tmp_path / "folder", FileClassifier(tmp_path / "model.onnx"), some, device.store, bundle)


@pytest.mark.parametrize("built", ["vit", "clip"], indirect=True)
def test_the_pipeline_of_an_image_model_gives_the_probabilities_of_predict(written: Written, tmp_path: Path) -> None:
    folder, photos = written.folder, written.samples
    Image.open(photos[0]).resize((IMAGE_SIZE * 3 // 2, IMAGE_SIZE * 2)).save(tmp_path / "portrait.png")
    photos = [*photos, tmp_path / "portrait.png"]
    theirs = pipeline(
        "image-classification",
        model=ORTModelForImageClassification.from_pretrained(folder),
        image_processor=AutoImageProcessor.from_pretrained(folder, use_fast=False),
        device="cpu",
    )
    for photo, found in zip(photos, theirs([str(photo) for photo in photos], top_k=len(CLASSES)), strict=True):
        expected = written.file.classify(photo).probabilities
        assert {one["label"]: one["score"] for one in found} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("built", ["bert"], indirect=True)
def test_the_pipeline_of_a_text_model_gives_the_probabilities_of_predict(written: Written, tmp_path: Path) -> None:
    """Also for a text that is longer than the model reads."""
    folder, texts = written.folder, written.samples
    (tmp_path / "long.txt").write_text(texts[0].read_text() * 40)
    texts = [*texts, tmp_path / "long.txt"]
    theirs = pipeline(
        "text-classification",
        model=ORTModelForSequenceClassification.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
        truncation=True,
    )
    for text, found in zip(texts, theirs([text.read_text() for text in texts], top_k=len(CLASSES)), strict=True):
        expected = written.file.classify(text).probabilities
        assert {one["label"]: one["score"] for one in found} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("built", ["vit"], indirect=True)
def test_a_folder_is_replaced_by_a_newer_model_but_never_mixed_with_other_files(written: Written) -> None:
    folder = written.folder
    write_model_folder(written.store, folder, written.bundle)
    assert json.loads((folder / "config.json").read_text())["id2label"] == {str(i): n for i, n in enumerate(CLASSES)}
    (folder / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"has other files, like notes.txt; pass a new or an empty folder"):
        write_model_folder(written.store, folder, written.bundle)
    with pytest.raises(ConfigError, match="is a file; pass a folder"):
        write_model_folder(written.store, folder / "config.json", written.bundle)
    with pytest.raises(BundleError, match="is not a personalized model"):
        FileClassifier(folder / "onnx" / "model.onnx")


@pytest.mark.parametrize("built", ["vit"], indirect=True)
@pytest.mark.parametrize("option", ["out", "folder"])
def test_a_path_that_cannot_be_written_is_an_error(written: Written, tmp_path: Path, option: str) -> None:
    (file := tmp_path / "server.log").touch()
    paths = {"out": None, "folder": None, option: file / "model"}
    with pytest.raises(ConfigError, match=r"server.log/model cannot be written \(.*\); choose another path"):
        personalize(written.store.root, written.bundle, **paths)
