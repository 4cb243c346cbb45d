"""What classifies files: a personalized model that was carried here as one ONNX file, or a device's newest one.

The second feeds the small blob that a device keeps after every round to its bundle's template. So the model changes
under a running stream by a swap of arrays, and the frozen weights stay mapped files, shared with whoever maps them too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, Json, ValidationError

from edge_runtime.data.inputs import Kind, Reader, reader_for, reader_of
from edge_runtime.engines.sessions import InferenceSession, open_model, open_session, run
from edge_runtime.store import DeviceStore
from edge_runtime.training.model import ModelHeader, PersonalModel, open_model_bundle, read_personal_model
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.algorithms.calibration import UNKNOWN
from fedfmsl.common.cli import notice
from fedfmsl.errors import BundleError, FedFMSLError
from fedfmsl.protocol.bundle import Bundle, Preprocessing
from fedfmsl.protocol.messages import Prediction

THREADS = 0  # as many as there are cores


class Classifier(Protocol):
    """`device` is the one whose model it is, `classes` those it knows, `kind` the files it takes."""

    @property
    def device(self) -> str: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def kind(self) -> Kind: ...

    def classify(self, path: Path) -> Prediction:
        """Raises InputError if the file cannot be read."""


@dataclass(frozen=True)
class Judgement:
    """How probabilities become a prediction. `threshold`: of confidence, below which the label is UNKNOWN."""

    device: str
    round: int
    classes: Sequence[str]
    threshold: float

    def of(self, path: Path, probabilities: Floats) -> Prediction:
        """`probabilities` (C,)."""
        best = int(probabilities.argmax())
        confidence = min(float(probabilities[best]), 1.0)
        return Prediction(
            device=self.device,
            file=str(path),
            time=time.time(),
            label=self.classes[best] if confidence >= self.threshold else UNKNOWN,
            confidence=confidence,
            probabilities={name: float(p) for name, p in zip(self.classes, probabilities, strict=True)},
            round=self.round,
        )


class _Metadata(BaseModel):
    """What of a personalized model's metadata is needed to use it (see `edge_runtime.inference.export_onnx`)."""

    device: str
    round: int
    threshold: float
    classes: Json[list[str]]
    preprocessing: Json[Preprocessing]
    tokenizer: str


class FileClassifier:
    """One ONNX file that says itself what it needs."""

    def __init__(self, model: Path, threshold: float | None = None) -> None:
        """`threshold` in place of the model's own. Raises BundleError if `model` is not a personalized model,
        ConfigError if what it needs for texts is not installed."""
        if not model.is_file():
            raise BundleError(
                f"model {model} does not exist; a device writes it as personalized.onnx in its state folder"
            )
        self._session = open_model(model, THREADS)
        try:
            metadata = _Metadata.model_validate(self._session.get_modelmeta().custom_metadata_map)
        except ValidationError as error:
            raise BundleError(f"{model} is an ONNX file, but not a personalized model of this project") from error
        self._reader = reader_for(metadata.preprocessing, metadata.tokenizer)
        least = metadata.threshold if threshold is None else threshold
        self._judgement = Judgement(metadata.device, metadata.round, metadata.classes, least)

    @property
    def device(self) -> str:
        return self._judgement.device

    @property
    def classes(self) -> Sequence[str]:
        return self._judgement.classes

    @property
    def kind(self) -> Kind:
        return self._reader.kind

    def classify(self, path: Path) -> Prediction:
        (probabilities,) = run(self._session, ["probabilities"], self._reader.batch([path]))
        return self._judgement.of(path, probabilities[0])


@dataclass(frozen=True)
class _Loaded:
    """A device's model, ready to use."""

    model: PersonalModel
    bundle: Bundle
    reader: Reader
    session: InferenceSession  # of the bundle's template at the model's level

    def is_of(self, header: ModelHeader) -> bool:
        return self.bundle.sha256 == header.bundle


class StateClassifier:
    """The newest model of a device. It looks for a newer one before each file, and has it at once, without a gap."""

    def __init__(self, store: DeviceStore, bundle: Path | None = None, threshold: float | None = None) -> None:
        """`bundle`: by default the model's own, in STATE/bundles. `threshold` in place of the model's own.

        Raises InputError if the device has no model yet, BundleError if the bundle is missing or not the model's,
        ConfigError if what it needs for texts is not installed.
        """
        self._store = store
        self._path = bundle
        self._threshold = threshold
        self._stamp = self._newest()
        self._loaded = self._load(None)

    @property
    def device(self) -> str:
        return self._loaded.model.header.device

    @property
    def classes(self) -> Sequence[str]:
        return self._loaded.bundle.manifest.classes

    @property
    def kind(self) -> Kind:
        return self._loaded.reader.kind

    def classify(self, path: Path) -> Prediction:
        self._keep_up()
        loaded = self._loaded
        inputs = {**loaded.model.inputs, **loaded.reader.batch([path])}
        (probabilities,) = run(loaded.session, ["probabilities"], inputs)
        header = loaded.model.header
        least = header.threshold if self._threshold is None else self._threshold
        return Judgement(header.device, header.round, self.classes, least).of(path, probabilities[0])

    def _newest(self) -> tuple[int, int] | None:
        """What tells one model on the disk from the next."""
        try:
            found = self._store.mixture.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _keep_up(self) -> None:
        """A newer model that cannot be used is mentioned once, and the older one stays."""
        newest = self._newest()
        if newest in (self._stamp, None):
            return
        self._stamp = newest
        try:
            self._loaded = self._load(self._loaded)
        except FedFMSLError as error:
            notice(f"the model of round {self._loaded.model.header.round} stays: {error}")

    def _load(self, before: _Loaded | None) -> _Loaded:
        """What has not changed is taken over from `before`, which serves until the new one is whole."""
        model = read_personal_model(self._store)
        header = model.header
        if before is None or not before.is_of(header):
            bundle = open_model_bundle(self._store, header, self._path)
            return _Loaded(model, bundle, reader_of(bundle), _template(bundle, header.level))
        same = before.model.header.level == header.level
        session = before.session if same else _template(before.bundle, header.level)
        return replace(before, model=model, session=session)


def _template(bundle: Bundle, level: int) -> InferenceSession:
    """Its weights stay the mapped file: packed for speed they would be a second copy."""
    return open_session(bundle, f"personal-{level}.onnx", THREADS, prepack=False)
