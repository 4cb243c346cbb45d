"""Classify images or texts with a personalized model: one ONNX file that says itself what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, Json, ValidationError

from edge_runtime.engine import run, session_for
from edge_runtime.inputs import Kind, reader_for
from protocol.bundle import Preprocessing
from protocol.errors import BundleError, InputError

THREADS = 0  # as many as there are cores


class _Metadata(BaseModel):
    """What of a personalized model's metadata is needed to use it (see `edge_runtime.personalize`)."""

    classes: Json[list[str]]
    preprocessing: Json[Preprocessing]
    tokenizer: str


def predict_files(model: Path, files: Sequence[Path]) -> Iterator[tuple[Path, dict[str, float]]]:
    """(path, probability of each class) for each image or text of `files` and of the folders in it.

    Raises BundleError if `model` is not a personalized model, InputError if there is no file of the kind it takes, or
    an unreadable one, ConfigError if what it needs for texts is not installed.
    """
    if not model.is_file():
        raise BundleError(f"model {model} does not exist; a device writes it as personalized.onnx in its state folder")
    session = session_for(model, THREADS)
    try:
        metadata = _Metadata.model_validate(session.get_modelmeta().custom_metadata_map)
    except ValidationError as error:
        raise BundleError(f"{model} is an ONNX file, but not a personalized model of this project") from error
    reader = reader_for(metadata.preprocessing, metadata.tokenizer)
    paths = [path for file in files for path in _files(file, reader.kind)]
    if not paths:
        raise InputError(f"no {reader.kind.noun}s in {', '.join(map(str, files))}")
    for path in paths:
        (probabilities,) = run(session, ["probabilities"], reader.batch([path]))
        yield path, {name: float(p) for name, p in zip(metadata.classes, probabilities[0], strict=True)}


def _files(path: Path, kind: Kind) -> list[Path]:
    if path.is_dir():
        return kind.files(path)
    if not path.is_file():
        raise InputError(f"{kind.noun} {path} does not exist")
    return [path]
