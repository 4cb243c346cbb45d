"""python -m benchmarks.membership: what class statistics tell about single photos, and what the head loses without them.

Photos and model are those of `benchmarks.evidence` on the groceries. Stage 1 is run once for each seed and α; everything
else is computed from the features and logits of all photos under its global expert. Writes benchmarks/membership.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from benchmarks.attacks import (
    accuracy,
    class_gram,
    cosine,
    feature_from_logits,
    least_squares_weights,
    linear_weights,
    moment_gram,
)
from benchmarks.evidence import BLOCKS, build_bundle
from devices.trial.assets import ASSETS, PHOTOS, fetch
from devices.trial.groceries import unpack_groceries
from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import TrainingContext
from fedfmsl.algorithms.arrays import Bools, Doubles, Labels, Vector
from fedfmsl.algorithms.class_means import class_sums
from fedfmsl.algorithms.discriminant import discriminant_head, logit_head, second_moments
from fedfmsl.common.cli import application
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Stage
from simulation.datasets import load_folder
from simulation.methods.fedfmsl import FedFMSL
from simulation.partition import by_dirichlet
from simulation.results import Cell
from simulation.run import TEST_SHARE, Simulation
from simulation.settings import SimulationSettings

REPORT = Path("benchmarks/membership.md")
BLOCK = "groceries"
ALPHAS = (0.5, 0.1)
DEVICES = 6
THRESHOLDS = ((1, 1), (1, 3), (5, 3), (10, 3), (10, 1))  # photos of a class on a device, devices with as many

app = application()


@dataclass(frozen=True)
class Photos:
    """n photos: features (n, F), logits of the global expert (n, C), labels (n,)."""

    features: Doubles
    logits: Doubles
    labels: Labels

    def __getitem__(self, chosen: Bools | Labels) -> Photos:
        return Photos(self.features[chosen], self.logits[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Run:
    """A run after stage 1. `head` is the trained one, flat, of `classes`. `train`: by device. `all`: of every device."""

    classes: int
    head: Vector
    train: Sequence[Photos]
    held_out: Photos
    test: Photos
    all: Photos


@app.command()
def membership(
    seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1."),
    threads: int = typer.Option(0, min=0, help="Threads; 0: one per core."),
) -> None:
    """Attack the statistics, measure the heads without them, and write the report."""
    images = unpack_groceries(fetch(PHOTOS), ASSETS / BLOCK)
    run = f"evidence-{BLOCK}"
    bundle = build_bundle(Path("runs") / f"{run}-bundle", images, BLOCKS[BLOCK].levels)
    settings = SimulationSettings(
        bundle=bundle.root, name=run, images=images, seeds=seeds, threads=threads, **BLOCKS[BLOCK].settings
    )
    simulation = Simulation(settings, bundle, load_folder(images, bundle, False, TEST_SHARE))
    simulation.compute_features(lambda _: None)
    runs = {alpha: [_stage1(simulation, cell) for cell in simulation.cells if cell.alpha == alpha] for alpha in ALPHAS}
    lines = [*_INTRODUCTION, *_attacks(runs[ALPHAS[0]]), *_inversions(runs[ALPHAS[0]]), *_heads(runs)]
    write_atomically(REPORT, ("\n".join(lines) + "\n").encode())
    print(REPORT)


def _stage1(simulation: Simulation, cell: Cell) -> Run:
    fleet, method, settings = simulation.fleet(cell, None), FedFMSL(), simulation.method_settings(cell)
    run, _ = method.start(fleet, settings)
    while run.announced.stage is not Stage.HEAD:
        run.step()
    expert = run.received.expert
    parts = fleet.map(_photos, dict.fromkeys([*fleet.names, *fleet.unseen], expert))
    fleet.close()
    members = [parts[name] for name in fleet.names]
    return Run(
        classes=len(fleet.bundle.manifest.classes),
        head=expert[: fleet.bundle.expert.size(0)],
        train=[part["train"] for part in members],
        held_out=_joined(part["held_out"] for part in members),
        test=_joined(part["test"] for part in members),
        all=_joined(photos for part in parts.values() for photos in part.values()),
    )


def _photos(context: TrainingContext, expert: Vector) -> dict[str, Photos]:
    """By split."""
    level, splits = context.level_of(expert), context.splits
    context.engine.load(level)
    context.engine.set(expert)
    found = {}
    for name, samples in (("train", splits.train), ("held_out", splits.held_out), ("test", splits.test)):
        cached = context.precise() if name == "test" else context
        batches = list(cached.hidden_states(samples, expert, level).batches()) if samples else []
        if batches:
            features = np.concatenate([context.engine.features(batch) for batch in batches]).astype(np.float64)
            logits = np.concatenate([context.engine.predict(batch) for batch in batches]).astype(np.float64)
            found[name] = Photos(features, logits, labels_of(samples))
    return found


def _joined(parts: Iterable[Photos]) -> Photos:
    each = list(parts)
    return Photos(
        np.concatenate([part.features for part in each]),
        np.concatenate([part.logits for part in each]),
        np.concatenate([part.labels for part in each]),
    )


# membership


def _attacks(runs: Sequence[Run]) -> list[str]:
    rows = {
        "each device's class sums of features": lambda run, owner: _least_squares(run, owner, each=True),
        "class sums of features over all devices": lambda run, owner: _least_squares(run, owner, each=False),
        "the same, of classes with 10 photos on each of 3 devices": _with_thresholds,
        "second moments of features over all devices": lambda run, owner: _linear(run, owner, "moments"),
        "each device's class sums and second moments of logits": lambda run, owner: _linear(run, owner, "each"),
        "the same, of classes with 10 photos on the device": lambda run, owner: _linear(run, owner, "each", 10),
        "class sums and second moments of logits over all devices": lambda run, owner: _linear(run, owner, "all"),
        "the same, of classes with 10 photos on the device (default)": lambda run, owner: _linear(run, owner, "all", 10),
        "no statistics": lambda run, _: (0.5, 1.0),
    }
    lines = [
        "## Membership",
        "",
        f"Half of the {len(runs[0].all.labels)} photos, drawn at random, are the members; {DEVICES} devices share them "
        f"(Dirichlet, α = {ALPHAS[0]:g}).",
        "The attacker has all photos. Accuracy is the share of photos whose membership it tells; chance is 0.5.",
        "",
        "| what the server sees | accuracy | photos |",
        "| --- | --- | --- |",
    ]
    for text, attack in rows.items():
        found = [attack(run, _owners(run, seed)) for seed, run in enumerate(runs)]
        scores, shares = zip(*found, strict=True)
        lines.append(f"| {text} | {_spread(scores)} | {statistics.mean(shares):.0%} |")
    lines += [
        "",
        "Photos: those whose class takes part; of the others the sums tell nothing.",
        "",
        "With N numbers about m candidates, independent ones, the best estimate tells about 0.5 + 0.4 · √(N / m) of them. Two points above chance",
        "need m = 400 · N: at 14 logits and 7 candidates a number, as here, no useful sum is that quiet.",
    ]
    return lines


def _owners(run: Run, seed: int) -> Labels:
    """By photo, the device that trains on it; -1 for the half that is not trained on."""
    labels = run.all.labels
    chosen = np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 2]
    nobody = np.empty(0, np.int64)
    owner = np.full(len(labels), -1)
    for device, own in enumerate(by_dirichlet(labels[chosen], nobody, DEVICES, ALPHAS[0], seed).train):
        owner[chosen[own]] = device
    return owner


def _least_squares(run: Run, owner: Labels, each: bool, chosen: Bools | None = None) -> tuple[float, float]:
    """Each class sum by non-negative least squares. A photo is a member if it is in one of the sums."""
    labels, features = run.all.labels, run.all.features
    weights = np.zeros(len(labels))
    for label in np.flatnonzero(np.ones(run.classes, np.bool_) if chosen is None else chosen):
        own = labels == label
        sums = [owner[own] == device for device in range(DEVICES)] if each else [owner[own] >= 0]
        found = [least_squares_weights(features[own], features[own][members].sum(axis=0)) for members in sums]
        weights[own] = np.max(found, axis=0)
    part = np.ones(len(labels), np.bool_) if chosen is None else chosen[labels]
    return (accuracy(weights[part], owner[part] >= 0) if part.any() else 0.5), float(part.mean())


def _with_thresholds(run: Run, owner: Labels) -> tuple[float, float]:
    """Photos of a class on a device with fewer than 10 are in no sum; the attacker does not know which."""
    counts = _counts(run, owner)
    holds, chosen = counts >= 10, (counts >= 10).sum(axis=0) >= 3
    summed = np.where((owner >= 0) & (holds[owner] & chosen)[np.arange(len(owner)), run.all.labels], owner, -1)
    return _least_squares(run, summed, each=False, chosen=chosen)


def _linear(run: Run, owner: Labels, kind: str, least: int = 1) -> tuple[float, float]:
    photos, counts = run.all, _counts(run, owner)
    summed = (owner >= 0) & (counts >= least)[owner, photos.labels]
    part = (counts >= least).any(axis=0)[photos.labels]
    if kind == "moments":
        gram = moment_gram(photos.features / np.linalg.norm(photos.features, axis=1, keepdims=True))
        return accuracy(linear_weights(gram, gram @ summed), summed), 1.0
    gram = class_gram(photos.logits, photos.labels) + moment_gram(photos.logits)
    if kind == "all":
        return accuracy(linear_weights(gram, gram @ summed)[part], summed[part]), float(part.mean())
    weights = [linear_weights(gram, gram @ (summed & (owner == device)), 1 / (2 * DEVICES)) for device in range(DEVICES)]
    return accuracy(np.sum(weights, axis=0)[part], summed[part]), float(part.mean())


def _counts(run: Run, owner: Labels) -> Labels:
    """Photos by device and class (K, C)."""
    return np.array([np.bincount(run.all.labels[owner == d], minlength=run.classes) for d in range(DEVICES)])
