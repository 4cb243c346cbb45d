"""Classifiers of files: with a personalized model in one ONNX file, or with the newest model of a device.

The second passes the small tensors that a device saves after every round to the template of its bundle. A model change
only replaces these tensors. The frozen weights stay memory-mapped files, which processes share.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import BaseModel, Json, ValidationError

from edge_runtime.data.features import POOLED
from edge_runtime.data.inputs import Kind, Reader, reader_for, reader_of
from edge_runtime.engines.sessions import InferenceSession, open_model, open_session, run
from edge_runtime.inference.adaptation import PriorAdapter
from edge_runtime.store import DeviceStore
from edge_runtime.training.personal_model import ModelHeader, PersonalModel
from edge_runtime.training.stored_model import open_model_bundle, read_personal_model
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.common.cli import notice
from fedfmsl.common.files import why_no_file
from fedfmsl.errors import BundleError, FedFMSLError, shown
from fedfmsl.protocol.bundle import Preprocessing
from fedfmsl.protocol.class_names import UNKNOWN
from fedfmsl.protocol.messages import Prediction
from fedfmsl.protocol.task_bundle import TaskBundle

THREADS = 0  # all cores


class Classifier(Protocol):
    """`device`: name of the device that trained the model. `kind`: kind of the files that it classifies."""

    @property
    def device(self) -> str: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def kind(self) -> Kind: ...

    def classify(self, path: Path) -> Prediction:
        """Raises InputError if the file cannot be read."""


@dataclass(frozen=True)
class Labeler:
    """Makes predictions from probabilities. If the confidence is below `threshold`, the label is UNKNOWN."""

    device: str
    round: int
    classes: Sequence[str]
    threshold: float

    def predict(self, path: Path, probabilities: Floats) -> Prediction:
        """The prediction for the file `path` from class probabilities (C,)."""
        best = int(probabilities.argmax())
        confidence = min(float(probabilities[best]), 1.0)
        return Prediction(
            device=self.device,
            file=shown(path),
            time=time.time(),
            label=self.classes[best] if confidence >= self.threshold else UNKNOWN,
            confidence=confidence,
            probabilities={name: float(p) for name, p in zip(self.classes, probabilities, strict=True)},
            round=self.round,
        )


class _Metadata(BaseModel):
    """The metadata of a personalized model that a classifier needs; see `edge_runtime.inference.export_onnx`."""

    device: str
    round: int
    temperature: float
    threshold: float
    prior: Json[tuple[float, ...]]
    held: Json[tuple[bool, ...]]
    classes: Json[list[str]]
    preprocessing: Json[Preprocessing]
    tokenizer: str


class FileClassifier:
    """Classifies with one self-contained ONNX file."""

    def __init__(self, model: Path, threshold: float | None = None, adapter: PriorAdapter | None = None) -> None:
        """`threshold` replaces the model's own. `adapter`: adapts the class prior; default: none.

        Raises BundleError if `model` is not a personalized model, ConfigError if the packages for texts are missing.
        """
        if reason := why_no_file(model):
            raise BundleError(f"model {model} {reason}; a device writes personalized.onnx to its state directory")
        try:
            self._session = open_model(model, THREADS)
            metadata = _Metadata.model_validate(self._session.get_modelmeta().custom_metadata_map)
        except (BundleError, ValidationError) as error:
            raise BundleError(f"{model} is not a personalized model; pass the personalized.onnx of a device") from error
        self._metadata = metadata
        self._adapter = adapter
        self._reader = reader_for(metadata.preprocessing, metadata.tokenizer)
        lowest = metadata.threshold if threshold is None else threshold
        self._labeler = Labeler(metadata.device, metadata.round, metadata.classes, lowest)

    @property
    def device(self) -> str:
        return self._labeler.device

    @property
    def classes(self) -> Sequence[str]:
        return self._labeler.classes

    @property
    def kind(self) -> Kind:
        return self._reader.kind

    def classify(self, path: Path) -> Prediction:
        ((probabilities,),) = run(self._session, ["probabilities"], self._reader.batch([path]))
        if self._adapter is not None:
            probabilities = self._adapter.adapt(probabilities, self._metadata)
        return self._labeler.predict(path, probabilities)


@dataclass(frozen=True)
class _LoadedModel:
    model: PersonalModel
    bundle: TaskBundle
    reader: Reader
    session: InferenceSession  # of the template at the model's level

    def is_for(self, header: ModelHeader) -> bool:
        """Whether bundle and task are those of another model."""
        return (self.bundle.sha256, self.bundle.task.sha256) == (header.bundle, header.task)


class StateClassifier:
    """Classifies with the newest model of a device. Checks for a newer model before each file."""

    def __init__(
        self,
        store: DeviceStore,
        bundle: Path | None = None,
        threshold: float | None = None,
        adapter: PriorAdapter | None = None,
    ) -> None:
        """`bundle`: default is the downloaded bundle in STATE/bundles. `threshold` replaces the model's own. `adapter`:
        adapts the class prior; default: none.

        Raises InputError if the device has no model yet, BundleError if the bundle is missing or another one,
        ConfigError if the packages for texts are missing.
        """
        self._store = store
        self._bundle_path = bundle
        self._threshold = threshold
        self._adapter = adapter
        self._backbone: tuple[str, InferenceSession] | None = None  # of `feature`, with its bundle's SHA-256
        self._version = self._newest_version()
        self._loaded = self._load(None)

    @property
    def device(self) -> str:
        return self._loaded.model.header.device

    @property
    def classes(self) -> Sequence[str]:
        return self._loaded.bundle.classes

    @property
    def kind(self) -> Kind:
        return self._loaded.reader.kind

    @property
    def round(self) -> int:
        """The round of the model."""
        return self._loaded.model.header.round

    def refresh(self) -> None:
        """Loads the newest model if it is another one. Reports an unusable one once, and keeps the current one."""
        newest = self._newest_version()
        if newest in (self._version, None):
            return
        self._version = newest
        try:
            self._loaded = self._load(self._loaded)
        except FedFMSLError as error:
            notice(f"still using the model of round {self._loaded.model.header.round}: {error}")

    def classify(self, path: Path) -> Prediction:
        return self._predict(path, self._adapter)

    def classify_again(self, path: Path) -> Prediction:
        """A prediction that the class prior is not adapted to: the file has been counted already."""
        return self._predict(path, None)

    def feature(self, path: Path) -> Vector:
        """The pooled feature (F,) of the frozen backbone. Raises InputError if the file cannot be read."""
        bundle = self._loaded.bundle
        if self._backbone is None or self._backbone[0] != bundle.sha256:
            self._backbone = bundle.sha256, open_session(bundle, "features.onnx", THREADS, prepack=False)
        ((feature,),) = run(self._backbone[1], [POOLED], self._loaded.reader.batch([path]))
        return np.asarray(feature, np.float32)

    def _predict(self, path: Path, adapter: PriorAdapter | None) -> Prediction:
        self.refresh()
        loaded = self._loaded
        inputs = {**loaded.model.inputs, **loaded.reader.batch([path])}
        ((probabilities,),) = run(loaded.session, ["probabilities"], inputs)
        header = loaded.model.header
        if adapter is not None:
            probabilities = adapter.adapt(probabilities, header)
        threshold = header.threshold if self._threshold is None else self._threshold
        return Labeler(header.device, header.round, self.classes, threshold).predict(path, probabilities)

    def _newest_version(self) -> tuple[int, int] | None:
        """Differs between any two models that were on the disk. None if there is no model."""
        try:
            status = self._store.mixture.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _load(self, before: _LoadedModel | None) -> _LoadedModel:
        """Reuses the unchanged parts of `before`."""
        model = read_personal_model(self._store)
        header = model.header
        if before is None or not before.is_for(header):
            bundle = open_model_bundle(self._store, header, self._bundle_path)
            return _LoadedModel(model, bundle, reader_of(bundle), _template(bundle, header.level))
        same = before.model.header.level == header.level
        session = before.session if same else _template(before.bundle, header.level)
        return replace(before, model=model, session=session)


def _template(bundle: TaskBundle, level: int) -> InferenceSession:
    """Does not pack the weights, so that they stay a shared memory-mapped file."""
    return open_session(bundle, f"personal-{level}.onnx", THREADS, prepack=False)
