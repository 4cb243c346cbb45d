"""Evaluates the models of every device on the test samples of the whole fleet, after the run.

Only the trial can do this: it has the samples and the state directories of all devices. A device never receives
samples of another one, and nothing is trained or chosen here.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.folder import SampleFolder
from edge_runtime.data.samples import are_in, contents_once, labels_of
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import Samples, TrainingContext
from edge_runtime.training.evaluation import predict_models
from edge_runtime.training.gate import Gate
from edge_runtime.training.stages import Globals, read_globals
from fedfmsl.algorithms.arrays import Bools, Floats
from fedfmsl.algorithms.evaluation import DeviceAccuracy, adapting_streams, device_accuracy, novel_samples
from fedfmsl.errors import RunError
from fedfmsl.protocol.messages import Round, Stage
from fedfmsl.protocol.task_bundle import TaskBundle
from trainer_server.coordinator.records import ClosedRound, successful_rounds
from trainer_server.storage.run_store import RunStore

ALL_CORES = 0
ADAPTS = "mofm"  # the model that adapts its class prior along a stream

ByModel = Mapping[str, Mapping[str, DeviceAccuracy]]  # model → device → accuracies


@dataclass(frozen=True)
class FleetEvaluation:
    """`devices`: the devices that took part. `unseen`: the others; their models are those of a device that has received
    the globals and has not trained."""

    devices: ByModel
    unseen: ByModel


def last_evaluation(rounds: Sequence[ClosedRound]) -> ClosedRound:
    """The last round of the stage evaluate. Raises RunError if there is none with test samples."""
    evaluations = successful_rounds(rounds, Stage.EVALUATE)
    if not evaluations or not any(update.samples for update in evaluations[-1].updates.values()):
        raise RunError("the run has no evaluation on test samples, so there is nothing to report")
    return evaluations[-1]


def evaluate_fleet(folder: Path, roots: Sequence[Path], unseen: Sequence[Path] = ()) -> FleetEvaluation:
    """Evaluates the run in `folder`. `roots`: the sample folders of its devices. `unseen`: those of devices that did
    not take part. Takes over the devices' feature caches, so that few features are computed again.

    Raises RunError if the run has no evaluation.
    """
    closed = last_evaluation(RunStore(folder).rounds.all())
    with tempfile.TemporaryDirectory(dir=folder, prefix="evaluation-") as scratch:
        for root in roots:
            _take_over(folder / "devices" / root.name / "cache", Path(scratch) / "cache")
        opened = _Opener(TaskBundle.load(folder / "bundle"), Path(scratch) / "cache")
        devices = [opened.device(root, folder / "devices" / root.name) for root in roots]
        others = [opened.device(root, Path(scratch) / root.name) for root in unseen]
        evaluated = [device for device in devices if device.device_name in closed.updates]
        published = read_globals(opened.bundle, evaluated[0].store.globals.read, closed.round)
        held = np.any([device.class_counts > 0 for device in devices], axis=0)
        return FleetEvaluation(
            devices=_measure(evaluated, _test_samples(devices), held, closed.round, published),
            unseen=_measure(others, _test_samples([*devices, *others]), held, closed.round, published),
        )


class _Opener:
    """Opens devices of one bundle. They share engine, gate and feature cache: they take turns, and a cache entry
    depends only on its name."""

    def __init__(self, bundle: TaskBundle, cache: Path) -> None:
        self.bundle = bundle
        self._features = FeatureCache(DiskCache(cache), bundle, ALL_CORES)
        self._engine = _MemoizedEngine(bundle, ALL_CORES)
        self._gate = Gate(bundle, ALL_CORES)

    def device(self, root: Path, state: Path) -> TrainingContext:
        state.mkdir(parents=True, exist_ok=True)
        store = DeviceStore(state)
        return TrainingContext(
            device_name=root.name,
            bundle=self.bundle,
            scanned=SampleFolder(root, self.bundle, store).scan(),
            cache=self._features,
            engine=self._engine,
            gate=self._gate,
            store=store,
            level_cap=self.bundle.manifest.levels,
            report=lambda *_: None,
        )


class _MemoizedEngine(StepGraphEngine):
    """Predicts each batch once per expert: all devices have the same global expert."""

    def __init__(self, bundle: TaskBundle, threads: int) -> None:
        super().__init__(bundle, threads)
        self._known: dict[bytes, Floats] = {}

    def predict(self, hidden: Floats) -> Floats:
        digest = hashlib.sha256(np.ascontiguousarray(self.get()).data)
        digest.update(np.ascontiguousarray(hidden).data)
        key = digest.digest()
        if key not in self._known:
            self._known[key] = super().predict(hidden)
        return self._known[key]


def _take_over(cache: Path, target: Path) -> None:
    """Moves the files of a feature cache into another one, and removes it."""
    for path in cache.glob("*/*"):
        (target / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.replace(target / path.parent.name / path.name)
    shutil.rmtree(cache, ignore_errors=True)


def _test_samples(devices: Sequence[TrainingContext]) -> Samples:
    return contents_once(sample for device in devices for sample in device.scanned.test)


def _measure(
    devices: Sequence[TrainingContext], samples: Samples, held_by_fleet: Bools, round_: Round, published: Globals
) -> ByModel:
    """Accuracies on n samples. `held_by_fleet` (C,): the classes that any device of the run holds."""
    labels = labels_of(samples)
    found: dict[str, dict[str, DeviceAccuracy]] = {}
    for device in devices:
        is_own = are_in(samples, device.scanned.test)
        is_novel = novel_samples(labels, device.class_counts > 0, held_by_fleet)
        for model, log_p in predict_models(device, round_, published, samples).items():
            accuracy = device_accuracy(log_p.argmax(axis=1), labels, is_own, is_novel)
            if model == ADAPTS:
                prior, counts = np.exp(device.biases.prior), device.class_counts
                streams = adapting_streams(log_p, labels, is_own, is_novel, prior, counts > 0)
                accuracy = replace(accuracy, stream=streams)
            found.setdefault(model, {})[device.device_name] = accuracy
    return found
