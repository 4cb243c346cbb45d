"""Sessions of one run in the simulator: each goes on from the one before, with other classes or other photos. Photos,
backbone, levels and shares are those of the trial; the weights are in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.evidence import build_bundle
from devices.trial.groceries import groceries
from edge_runtime.data.features import Features
from edge_runtime.data.samples import Sample, Splits, assign_splits, labels_of
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.evaluation import predict_models
from edge_runtime.training.stages import Globals
from fedfmsl.algorithms.arrays import Labels
from fedfmsl.algorithms.class_mapping import NEW, class_indices
from fedfmsl.algorithms.sal import CapabilityQueue
from fedfmsl.protocol.messages import Round
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.datasets import Dataset, load_folder
from simulation.federation import Federation
from simulation.fleet import Fleet, LocalFleet, compute_features
from simulation.partition import by_dirichlet
from simulation.run import TEST_SHARE
from simulation.store import FileStore
from trainer_server.config import STAGE1, STAGE2, RunConfig, Trigger, sal_rules

RUNS = Path("runs/sessions")
LEVELS, DEVICES, ALPHA = 3, 6, 0.5  # as in the trial
MODELS = {"global": "global", "MoFM": "mofm"}  # title, and name in `predict_models`


@dataclass(frozen=True)
class TrialPhotos:
    """`store`: hidden states and features of all photos, computed once."""

    bundle: TaskBundle
    data: Dataset
    store: FileStore
    threads: int

    @classmethod
    def load(cls, threads: int) -> TrialPhotos:
        images = groceries()
        bundle = build_bundle(Path(f"{RUNS}-bundle"), images, LEVELS)
        data = load_folder(images, bundle, False, TEST_SHARE)
        names = sorted(sample.sha256 for sample in (*data.train, *data.test))
        return cls(bundle, data, FileStore(Path(f"{RUNS}-features"), names), threads)

    def splits(self, seed: int, levels: int) -> dict[str, Splits]:
        """By device. Computes the states that sessions need at these levels."""
        train, test = self.data.train, self.data.test
        partition = by_dirichlet(labels_of(train), labels_of(test), DEVICES, ALPHA, seed)
        splits = {
            f"device-{index}": assign_splits([train[row] for row in own], [test[row] for row in tests], {})
            for index, (own, tests) in enumerate(zip(partition.train, partition.test, strict=True))
        }
        return compute_features(self._features(self.bundle), splits, levels)

    @contextmanager
    def fleet(self, bundle: TaskBundle, splits: Mapping[str, Splits]) -> Iterator[LocalFleet]:
        """Devices that have photos to train on, for one session."""
        able = {name: each for name, each in splits.items() if each.train and each.held_out}
        with TemporaryDirectory(prefix="fedfmsl-sessions-") as states:
            yield LocalFleet(bundle, self._features(bundle), able, Path(states), self.threads)

    def _features(self, bundle: TaskBundle) -> Features[FileStore]:
        return Features(self.store, bundle, self.threads, reader=self.data.inputs)


def config(seed: int, levels: int, **settings: Any) -> RunConfig:
    """The server's defaults, with the seed of the simulation."""
    stage1_sal, stage2_sal = sal_rules(Trigger.CAPABILITY_QUEUE, CapabilityQueue().min_gain, levels)
    stages = {
        "stage1": STAGE1.model_copy(update={"seed": seed}),
        "stage2": STAGE2.model_copy(update={"seed": seed}),
        "stage1_sal": stage1_sal,
        "stage2_sal": stage2_sal,
    }
    return RunConfig.model_validate({"run": "sessions", "devices": DEVICES, "seed": seed, **stages, **settings})


def with_classes(bundle: TaskBundle, classes: Sequence[str]) -> TaskBundle:
    """The bundle with other classes."""
    return TaskBundle(bundle, Task(bundle.sha256, tuple(classes)))


def of_classes(splits: Splits, before: Sequence[str], after: Sequence[str]) -> Splits:
    """The samples whose classes are in the list `after`, with their labels in it. Their splits stay."""
    indices = class_indices(after, before)

    def part(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        found = (replace(sample, label=int(indices[sample.label])) for sample in samples)
        return tuple(sample for sample in found if sample.label != NEW)

    return replace(splits, train=part(splits.train), held_out=part(splits.held_out), test=part(splits.test))


@dataclass(frozen=True)
class Predicted:
    """Labels (n,) of samples, and the most likely classes (n,) by model."""

    labels: Labels
    classes: dict[str, Labels]

    def accuracy(self, model: str, classes: Sequence[int]) -> float:
        """On the samples of these classes."""
        chosen = np.isin(self.labels, classes)
        return float((self.classes[model] == self.labels)[chosen].mean())


@dataclass(frozen=True)
class _Task:
    round: Round
    received: Globals
    split: str


def predict(run: Federation, fleet: Fleet, split: str) -> Predicted:
    """By the models of each device, its own samples of the `split` ("held_out" or "test")."""
    task = _Task(run.announced, run.received, split)
    parts = [part for part in fleet.map(_predict, dict.fromkeys(fleet.names, task)).values() if part is not None]
    classes = {model: np.concatenate([part.classes[model] for part in parts]) for model in MODELS}
    return Predicted(np.concatenate([part.labels for part in parts]), classes)


def _predict(context: TrainingContext, task: _Task) -> Predicted | None:
    samples: tuple[Sample, ...] = getattr(context.splits, task.split)
    if not samples:
        return None
    log_p = predict_models(context, task.round, task.received, samples)
    found = {model: np.asarray(log_p[name].argmax(axis=1), np.int64) for model, name in MODELS.items()}
    return Predicted(labels_of(samples), found)
