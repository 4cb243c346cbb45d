"""Sessions of one run in the simulator: each goes on from the one before, with other classes or other photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.data.samples import Sample, Splits, labels_of
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.evaluation import predict_models
from edge_runtime.training.stages import Globals
from fedfmsl.algorithms.arrays import Labels
from fedfmsl.algorithms.class_mapping import NEW, class_indices
from fedfmsl.protocol.messages import Round
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.federation import Federation
from simulation.fleet import Fleet

MODELS = {"global": "global", "MoFM": "mofm"}  # title, and name in `predict_models`


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
