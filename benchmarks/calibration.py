"""python -m benchmarks.calibration: temperature and threshold of devices, on photos of other shop visits and of
classes that no device was trained on.

Data, model and settings are those of `devices.trial` at α = 0.5, in one process (see `simulation.federation`). Two
classes are left out, different ones for each seed. Needs `python -m devices.trial.assets` and
`python -m export.rebuild assets/dinov2-s14.onnx assets/dinov2-s14` first. The predictions of a seed are kept in
runs/calibration and not computed again.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import typer

from benchmarks.aggregation import ALPHA, CONFIGURATIONS, DEVICES, trial_bundle, trial_config, trial_photos
from devices.trial.shares import write_device_folders
from edge_runtime.data.samples import labels_of
from edge_runtime.inference.classifier import StateClassifier
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.stored_model import read_personal_model
from fedfmsl.algorithms.arrays import Floats, Labels
from fedfmsl.algorithms.calibration import calibrate, fit_temperature, unknown_threshold
from fedfmsl.algorithms.mixture import accuracy, nll
from fedfmsl.common.cli import application
from simulation.federation import federate
from simulation.fleet import open_folders

FOLDER = Path("runs") / "calibration"
LEFT_OUT = 2  # classes
COLUMNS = (
    "photos",
    "accuracy",
    "NLL",
    "with T",
    "ECE",
    "with T",
    "T",
    "known called unknown",
    "untrained called unknown",
)
BINS = 15  # of the expected calibration error, of equal width (Guo et al. 2017)

app = application()


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities (n, C) of a device's model before calibration, on its held-out photos, its test photos, and
    photos of the untrained classes."""

    held_out: Floats
    held_out_labels: Labels
    test: Floats
    test_labels: Labels
    untrained: Floats

    @cached_property
    def temperature(self) -> float:
        return fit_temperature(self.held_out, self.held_out_labels)

    @cached_property
    def threshold(self) -> float:
        return unknown_threshold(np.exp(calibrate(self.held_out, self.temperature).max(axis=1)))

    def unknown(self, log_p: Floats) -> int:
        return int((np.exp(calibrate(log_p, self.temperature).max(axis=1)) < self.threshold).sum())


@app.command()
def calibration(
    seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1."),
    threads: int = typer.Option(0, min=0, help="Threads; 0: one per core."),
) -> None:
    """Measure the calibration of the devices' models, and their threshold for unknown samples."""
    print(f"| seed | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}", flush=True)
    rows = []
    for seed in range(seeds):
        path = FOLDER / f"predictions-{seed}.npz"
        if not path.is_file():
            _save(path, _predict(seed, threads or os.cpu_count() or 1))
        rows.append(_row(_load(path)))
        print(f"| {seed} | {' | '.join(f'{value:.3g}' for value in rows[-1])} |", flush=True)
    if len(rows) > 1:
        columns = list(zip(*rows, strict=True))
        cells = [f"{statistics.mean(column):.3g} ± {statistics.stdev(column):.2g}" for column in columns]
        print(f"| all | {' | '.join(cells)} |")


def expected_calibration_error(log_p: Floats, labels: Labels) -> float:
    """Mean gap between confidence and accuracy, over BINS of confidence weighted by their size (Guo et al. 2017)."""
    confidence, correct = np.exp(log_p.max(axis=1)), log_p.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(float(confidence[bins == b].sum()) - float(correct[bins == b].sum())) for b in range(BINS)]
    return sum(gaps) / len(labels)


def _predict(seed: int, threads: int) -> list[Predictions]:
    """Trains the devices of a seed and returns the predictions of each device's model."""
    train, test = trial_photos()
    left_out = np.random.default_rng(seed).choice(sorted(train), LEFT_OUT, replace=False).tolist()
    untrained = [path for name in left_out for path in test[name]]
    for name in left_out:
        del train[name], test[name]
    bundle = trial_bundle(FOLDER / f"bundle-{seed}", [*train], seed)
    folders = write_device_folders(train, test, FOLDER / f"samples-{seed}", DEVICES, ALPHA, seed)
    fleet = open_folders(bundle, folders, FOLDER / f"devices-{seed}", FOLDER / "cache", threads)
    federate(trial_config(CONFIGURATIONS["reference"], seed), fleet)
    return [_predictions_of(device, untrained) for device in map(fleet.context, fleet.names)]


def _predictions_of(device: TrainingContext, untrained: Sequence[Path]) -> Predictions:
    classifier = StateClassifier(device.store, device.bundle.root)
    temperature = read_personal_model(device.store).header.temperature

    def log_p(paths: Sequence[Path]) -> Floats:
        rows = [list(classifier.classify(path).probabilities.values()) for path in paths]
        calibrated = np.log(np.maximum(np.array(rows, np.float32).reshape(len(rows), device.classes), 1e-38))
        return calibrate(calibrated, 1 / temperature)  # undoes the calibration

    held_out, test = device.splits.held_out, device.scanned.test
    own = log_p([sample.path for sample in held_out]), labels_of(held_out)
    return Predictions(*own, log_p([sample.path for sample in test]), labels_of(test), log_p(untrained))


def _save(path: Path, devices: Sequence[Predictions]) -> None:
    names = [each.name for each in fields(Predictions)]
    arrays = {f"{number} {name}": getattr(each, name) for number, each in enumerate(devices) for name in names}
    np.savez(path, **arrays)


def _load(path: Path) -> list[Predictions]:
    with np.load(path, allow_pickle=False) as arrays:
        names = [each.name for each in fields(Predictions)]
        return [Predictions(*(arrays[f"{number} {name}"] for name in names)) for number in range(DEVICES)]


def _row(devices: list[Predictions]) -> list[float]:
    labels = np.concatenate([each.test_labels for each in devices])
    before = np.concatenate([each.test for each in devices])
    after = np.concatenate([calibrate(each.test, each.temperature) for each in devices])
    return [
        len(labels),
        accuracy(after, labels),
        nll(before, labels),
        nll(after, labels),
        expected_calibration_error(before, labels),
        expected_calibration_error(after, labels),
        statistics.mean(each.temperature for each in devices),
        sum(each.unknown(each.test) for each in devices) / len(labels),
        sum(each.unknown(each.untrained) for each in devices) / sum(len(each.untrained) for each in devices),
    ]


if __name__ == "__main__":
    app()
