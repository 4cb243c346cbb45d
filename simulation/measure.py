"""Measures the models of a method on the devices of a fleet, and on unseen devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edge_runtime.data.samples import are_in, contents_once, labels_of
from edge_runtime.training.context import Samples, TrainingContext
from fedfmsl.algorithms.arrays import Bools, Labels
from fedfmsl.algorithms.evaluation import DeviceAccuracy, adapting_streams, device_accuracy, novel_samples, summarize
from simulation.fleet import Fleet
from simulation.methods.base import Method

Measured = dict[str, dict[str, Any]]  # a row of the table → the fields of `fedfmsl.algorithms.evaluation.FleetAccuracy`


@dataclass(frozen=True)
class Task:
    """`kinds`: which samples (n,) are the device's own, and which are novel to it; None if they are no test samples."""

    method: Method[Any, Any]
    model: Any
    samples: Samples
    kinds: tuple[Bools, Bools] | None


@dataclass(frozen=True)
class Predicted:
    """The most likely classes (n,). `stream`: accuracy by share, of a model that adapts along a stream."""

    classes: Labels
    stream: Mapping[float, float] | None = None


def measure(method: Method[Any, Any], fleet: Fleet, state: Any, devices: Sequence[str], test_devices: int) -> Measured:
    """Accuracies on test samples. All `devices` are measured on their own ones: own, and streams without novel samples.
    The first `test_devices` are measured on those of the federation too: fleet, novel and other streams are about
    them."""
    shared = [sample for name in fleet.names for sample in fleet.splits(name).test]
    tests = {name: contents_once((*fleet.splits(name).test, *shared)) for name in devices[:test_devices]}
    tests |= {name: fleet.splits(name).test for name in devices[test_devices:]}
    classes = len(fleet.bundle.classes)
    held = {name: fleet.splits(name).class_counts(classes) > 0 for name in {*fleet.names, *devices}}
    by_fleet = np.any([held[name] for name in fleet.names], axis=0)
    shared_by = set(devices[:test_devices])
    kinds = {
        name: (
            are_in(samples, fleet.splits(name).test),
            novel_samples(labels_of(samples), held[name], by_fleet) & (name in shared_by),
        )
        for name, samples in tests.items()
    }
    predicted = predict(method, fleet, state, tests, kinds)
    accuracies: dict[str, list[DeviceAccuracy]] = {}
    for name in devices:
        for row, found in predicted[name].items():
            accuracy = device_accuracy(found.classes, labels_of(tests[name]), *kinds[name])
            if found.stream is not None:
                accuracy = replace(accuracy, stream=found.stream)
            if name not in shared_by:
                accuracy = replace(accuracy, fleet=None, fleet_count=0)
            accuracies.setdefault(row, []).append(accuracy)
    return {row: asdict(summarize(each)) for row, each in accuracies.items()}


def held_out_accuracy(method: Method[Any, Any], fleet: Fleet, state: Any) -> dict[str, float]:
    """Accuracy by row on the held-out splits of the federation, weighted by samples. For choices between settings."""
    samples = {name: fleet.splits(name).held_out for name in fleet.names}
    predicted = predict(method, fleet, state, samples, {})
    correct: dict[str, list[Bools]] = {}
    for name, rows in predicted.items():
        for row, found in rows.items():
            correct.setdefault(row, []).append(found.classes == labels_of(samples[name]))
    return {row: float(np.concatenate(each).mean()) for row, each in correct.items()}


def predict(
    method: Method[Any, Any],
    fleet: Fleet,
    state: Any,
    samples: Mapping[str, Samples],
    kinds: Mapping[str, tuple[Bools, Bools]],
) -> dict[str, dict[str, Predicted]]:
    """By device and row: predictions for the device's samples. `kinds` of test samples: see `Task`."""
    tasks = ((name, Task(method, method.model(state, name), each, kinds.get(name))) for name, each in samples.items())
    return dict(fleet.each(_predict, tasks))


def _predict(context: TrainingContext, task: Task) -> dict[str, Predicted]:
    rows = task.method.log_p(context, task.model, task.samples)
    predicted = {row: Predicted(np.asarray(log_p.argmax(axis=1), np.int64)) for row, log_p in rows.items()}
    if task.kinds is not None:
        labels, prior, held = labels_of(task.samples), np.exp(context.biases.prior), context.class_counts > 0
        for row in task.method.adapting:
            stream = adapting_streams(rows[row], labels, *task.kinds, prior, held)
            predicted[row] = replace(predicted[row], stream=stream)
    return predicted
