"""python -m benchmarks.calibration: what a device's temperature and threshold are worth on photos of other shop visits,
and on photos of fruit that nobody has trained on.

The data, model and settings of `devices.trial` at α = 0.5, run in one process (see `benchmarks.federation`), but for
two classes that are left out, other ones for each seed; after `python -m devices.assets` and
`python -m export.rebuild assets/dinov2-s14.onnx assets/dinov2-s14`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from benchmarks.aggregation import ALPHA, CONFIGURATIONS, DEVICES, groceries, trial_config
from benchmarks.federation import federate, open_devices
from devices.assets import ASSETS
from devices.dataset import find_files, kind_of
from devices.split import write_fleet
from edge_runtime.calibration import calibrated
from edge_runtime.classifier import StateClassifier
from edge_runtime.device import Device
from edge_runtime.engine import Floats
from edge_runtime.mixture import Labels, accuracy, nll
from edge_runtime.model import PersonalModel, read_personal_model
from edge_runtime.samples import labels_of
from protocol.bundle import Bundle
from protocol.errors import RunError
from shell.cli import application

LEFT_OUT = 2  # classes
COLUMNS = ("photos", "accuracy", "NLL", "calibrated", "ECE", "calibrated", "T", "known called unknown", "foreign")
BINS = 15  # of the expected calibration error, of equal width, as Guo et al. have them

app = application("What calibration is worth.")


@dataclass(frozen=True)
class Seen:
    """One device's model on its own test photos, and on the foreign ones: log-probabilities (n, C) as it gives them."""

    model: PersonalModel
    held_out: int
    log_p: Floats
    labels: Labels
    foreign: Floats

    @property
    def before(self) -> Floats:
        """Of its own test photos, without the temperature."""
        return calibrated(self.log_p, 1 / self.model.header.temperature)

    def unknown(self, log_p: Floats) -> int:
        return int((np.exp(log_p.max(axis=1)) < self.model.header.threshold).sum())


@app.command()
def calibration(
    seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1."),
    threads: int = typer.Option(0, min=0, help="Threads to compute with. 0: one per core."),
) -> None:
    header = (
        "seed | test photos | accuracy | NLL before | after | ECE before | after | T | known called unknown | foreign"
    )
    print(f"| {header} |\n|{'---|' * 10}", flush=True)
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_row(_federate(Path(folder), seed, threads or os.cpu_count() or 1)))
        print(f"| {seed} | {' | '.join(f'{value:.3g}' for value in rows[-1])} |", flush=True)
    if len(rows) > 1:
        spread = [
            f"{statistics.mean(column):.3f} ± {statistics.stdev(column):.3f}" for column in zip(*rows, strict=True)
        ]
        print(f"| all | {' | '.join(spread)} |")


def expected_calibration_error(log_p: Floats, labels: Labels) -> float:
    """Mean gap between confidence and accuracy, over BINS of confidence weighted by their size (Guo et al. 2017)."""
    confidence, correct = np.exp(log_p.max(axis=1)), log_p.argmax(axis=1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(float(confidence[bins == b].sum()) - float(correct[bins == b].sum())) for b in range(BINS)]
    return sum(gaps) / len(labels)


def _federate(folder: Path, seed: int, threads: int) -> list[Seen]:
    train, test = find_files(groceries(), kind_of(groceries()), None)
    left_out = np.random.default_rng(seed).choice(sorted(train), LEFT_OUT, replace=False).tolist()
    foreign = [path for name in left_out for path in test[name]]
    for name in left_out:
        del train[name], test[name]
    command = ["export.build", "--model", "dinov2-s14", "--weights", str(ASSETS / "dinov2-s14"), "--image-size", "140"]
    command += ["--classes", ",".join(train), "--levels", "3", "--seed", str(seed), "--out", str(folder / "bundle")]
    if subprocess.run([sys.executable, "-m", *command], check=False, stdout=sys.stderr).returncode:
        raise RunError("the bundle could not be built")
    bundle = Bundle(folder / "bundle")
    homes = write_fleet(train, test, folder / "samples", DEVICES, ALPHA, seed)
    devices = open_devices(bundle, homes, folder / "devices", folder / "cache", threads)
    federate(trial_config(CONFIGURATIONS["reference"], seed), devices)
    return [_seen(device, foreign) for device in devices]


def _seen(device: Device, foreign: Sequence[Path]) -> Seen:
    classifier = StateClassifier(device.store, device.bundle.root)

    def log_p(paths: Sequence[Path]) -> Floats:
        rows = [list(classifier.classify(path).probabilities.values()) for path in paths]
        return np.log(np.maximum(np.array(rows, np.float32).reshape(len(rows), device.classes), 1e-38))

    test = device.scanned.test
    own = log_p([sample.path for sample in test])
    model, held_out = read_personal_model(device.store), len(device.slices.held_out)
    return Seen(model, held_out, own, labels_of(test), log_p(foreign))


def _row(seen: list[Seen]) -> list[float]:
    labels = np.concatenate([each.labels for each in seen])
    before, after = (np.concatenate([getattr(each, name) for each in seen]) for name in ("before", "log_p"))
    temperatures = [each.model.header.temperature for each in seen]
    for header, size in ((each.model.header, each.held_out) for each in seen):
        print(f"{header.device}: {size} held out, T {header.temperature:.2f}, {header.threshold:.2f}", file=sys.stderr)
    return [
        len(labels),
        accuracy(after, labels),
        nll(before, labels),
        nll(after, labels),
        expected_calibration_error(before, labels),
        expected_calibration_error(after, labels),
        statistics.mean(temperatures),
        sum(each.unknown(each.log_p) for each in seen) / len(labels),
        sum(each.unknown(each.foreign) for each in seen) / sum(len(each.foreign) for each in seen),
    ]


if __name__ == "__main__":
    app()
