"""Classify images with a personalized model: one ONNX file that says itself what it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edge_runtime.engine import run, session_for
from edge_runtime.images import image_files, load_pixels
from protocol.bundle import Preprocessing
from protocol.errors import BundleError, InputError

THREADS = 0  # as many as there are cores


def predict_files(model: Path, files: Sequence[Path]) -> Iterator[tuple[Path, dict[str, float]]]:
    """(path, probability of each class) for each image of `files` and of the folders in it.

    Raises BundleError if `model` is not a personalized model, InputError if there is no image, or an unreadable one.
    """
    if not model.is_file():
        raise BundleError(f"model {model} does not exist; a device writes it as personalized.onnx in its state folder")
    session = session_for(model, THREADS)
    metadata = session.get_modelmeta().custom_metadata_map
    try:
        classes: list[str] = json.loads(metadata["classes"])
        preprocessing = Preprocessing.model_validate_json(metadata["preprocessing"])
    except (KeyError, ValueError) as error:
        raise BundleError(f"{model} is an ONNX file, but not a personalized model of this project") from error
    paths = [path for file in files for path in _images(file)]
    if not paths:
        raise InputError(f"no images in {', '.join(map(str, files))}")
    for path in paths:
        pixels = load_pixels(path, preprocessing)[np.newaxis]
        (probabilities,) = run(session, ["probabilities"], {"pixels": pixels})
        yield path, {name: float(p) for name, p in zip(classes, probabilities[0], strict=True)}


def _images(path: Path) -> list[Path]:
    if path.is_dir():
        return image_files(path)
    if not path.is_file():
        raise InputError(f"image {path} does not exist")
    return [path]
