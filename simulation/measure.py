"""Measures the models of a method on the devices of a fleet, and on unseen devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.arrays import Bools, Labels
from fedfmsl.algorithms.evaluation import DeviceAccuracy, device_accuracy, novel_samples, summarize
from simulation.fleet import Fleet
from simulation.methods.base import Method

Measured = dict[str, dict[str, Any]]  # a row of the table → the fields of `fedfmsl.algorithms.evaluation.FleetAccuracy`


@dataclass(frozen=True)
class Task:
    method: Method[Any, Any]
    model: Any
    samples: Samples


def measure(method: Method[Any, Any], fleet: Fleet, state: Any, devices: Sequence[str], test_devices: int) -> Measured:
    """Accuracies on test samples. All `devices` are measured on their own ones. The first `test_devices` are measured
    on those of the federation too: fleet, novel and streams are about them."""
    shared = [sample for name in fleet.names for sample in fleet.splits(name).test]
    tests = {name: _once((*fleet.splits(name).test, *shared)) for name in devices[:test_devices]}
    tests |= {name: fleet.splits(name).test for name in devices[test_devices:]}
    predicted = predict(method, fleet, state, tests)
    classes = len(fleet.bundle.manifest.classes)
    held = {name: fleet.splits(name).class_counts(classes) > 0 for name in {*fleet.names, *devices}}
    by_fleet = np.any([held[name] for name in fleet.names], axis=0)
    accuracies: dict[str, list[DeviceAccuracy]] = {}
    for name in devices:
        labels, own = labels_of(tests[name]), _is_own(fleet, name, tests[name])
        is_novel = novel_samples(labels, held[name], by_fleet)
        for row, classes_found in predicted[name].items():
            accuracy = device_accuracy(classes_found, labels, own, is_novel)
            if name not in devices[:test_devices]:
                accuracy = replace(accuracy, fleet=None, fleet_count=0, novel=None, novel_count=0)
            accuracies.setdefault(row, []).append(accuracy)
    return {row: asdict(summarize(each)) for row, each in accuracies.items()}


def held_out_accuracy(method: Method[Any, Any], fleet: Fleet, state: Any) -> dict[str, float]:
    """Accuracy by row on the held-out splits of the federation, weighted by samples. For choices between settings."""
    samples = {name: fleet.splits(name).held_out for name in fleet.names}
    predicted = predict(method, fleet, state, samples)
    correct: dict[str, list[Bools]] = {}
    for name, rows in predicted.items():
        for row, found in rows.items():
            correct.setdefault(row, []).append(found == labels_of(samples[name]))
    return {row: float(np.concatenate(each).mean()) for row, each in correct.items()}


def predict(
    method: Method[Any, Any], fleet: Fleet, state: Any, samples: Mapping[str, Samples]
) -> dict[str, dict[str, Labels]]:
    """By device and row: the most likely class (n,) of each of the device's samples."""
    tasks = {name: Task(method, method.model(state, name), each) for name, each in samples.items()}
    return fleet.map(_predict, tasks)


def _predict(context: TrainingContext, task: Task) -> dict[str, Labels]:
    rows = task.method.log_p(context, task.model, task.samples)
    return {row: np.asarray(log_p.argmax(axis=1), np.int64) for row, log_p in rows.items()}


def _once(samples: Samples) -> Samples:
    return tuple({sample.sha256: sample for sample in samples}.values())


def _is_own(fleet: Fleet, name: str, samples: Samples) -> Bools:
    """Which samples (n,) are of the device's own test split."""
    own = {sample.sha256 for sample in fleet.splits(name).test}
    return np.array([sample.sha256 in own for sample in samples], bool)
