"""python -m benchmarks.membership: what class statistics tell about single photos, and what the head is without them.

Photos and model are those of `benchmarks.evidence` on the groceries. Stage 1 is run once for each seed and α. All else
is computed from the features and logits of all photos under its global expert. Writes benchmarks/membership.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import typer

from benchmarks.attacks import (
    balanced_accuracy,
    class_gram,
    cosine,
    feature_from_logits,
    least_squares_weights,
    linear_weights,
    moment_gram,
)
from benchmarks.evidence import BLOCKS, build_bundle
from benchmarks.tables import spread
from devices.trial.groceries import groceries
from edge_runtime.data.samples import labels_of
from edge_runtime.training.context import TrainingContext
from fedfmsl.algorithms.arrays import Bools, Doubles, Labels, Vector
from fedfmsl.algorithms.class_means import class_sums
from fedfmsl.algorithms.discriminant import discriminant_head, logit_head, second_moments, with_former_rows
from fedfmsl.common.cli import application
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Stage
from simulation.datasets import load_folder
from simulation.methods.ablations import without_head_round
from simulation.methods.fedfmsl import FedFMSL
from simulation.partition import by_dirichlet
from simulation.results import Cell
from simulation.run import TEST_SHARE, Simulation
from simulation.settings import SimulationSettings

REPORT = Path(__file__).with_name("membership.md")
BLOCK = "groceries"
ALPHAS = (0.5, 0.1)
DEVICES = 6
# photos of a class on a device, devices with as many, photos on all devices; the second is the default
THRESHOLDS = ((1, 1, 1), (1, 1, 10), (10, 1, 10), (1, 3, 10), (10, 3, 30))

INTRODUCTION = [
    "# What class statistics tell",
    "",
    "Groceries, model and settings of [evidence.md](evidence.md). Features and logits are those of the global expert",
    "after stage 1. Mean ± standard deviation over the seeds. Written by `python -m benchmarks.membership`.",
    "What the updates of training and the trained weights reveal is not measured here.",
    "",
]

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
    """A run after stage 1. `head` is the trained one, flat. `train`: by device. `all`: the photos of every device."""

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
    images = groceries()
    run = f"evidence-{BLOCK}"
    bundle = build_bundle(Path("runs") / f"{run}-bundle", images, BLOCKS[BLOCK].levels)
    settings = SimulationSettings(
        bundle=bundle.root, name=run, images=images, seeds=seeds, threads=threads, **BLOCKS[BLOCK].settings
    )
    simulation = Simulation(settings, bundle, load_folder(images, bundle, False, TEST_SHARE))
    simulation.compute_features(lambda _: None)
    cells = {alpha: [cell for cell in simulation.cells if cell.alpha == alpha] for alpha in ALPHAS}
    runs = {alpha: [_stage1(simulation, cell, FedFMSL()) for cell in cells[alpha]] for alpha in ALPHAS}
    without = {alpha: [_stage1(simulation, cell, without_head_round()) for cell in cells[alpha]] for alpha in ALPHAS}
    lines = [*INTRODUCTION, *_attacks(runs[ALPHAS[0]]), *_inversions(runs[ALPHAS[0]]), *_heads(runs, without)]
    write_atomically(REPORT, ("\n".join(lines) + "\n").encode())
    print(REPORT)


def _stage1(simulation: Simulation, cell: Cell, method: FedFMSL) -> Run:
    fleet, settings = simulation.fleet(cell, None), simulation.method_settings(cell)
    run, _ = method.start(fleet, settings)
    while run.announced.stage not in (Stage.HEAD, Stage.PERSONAL):
        run.step()
    expert = run.received.expert
    parts = fleet.map(_photos, dict.fromkeys([*fleet.names, *fleet.unseen], expert))
    fleet.close()
    members = [parts[name] for name in fleet.names]
    return Run(
        classes=len(fleet.bundle.classes),
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


@dataclass(frozen=True)
class Seen:
    """What an attacker learns: its accuracy, and the share of the photos that this is about."""

    accuracy: float
    share: float


Attack = Callable[[Run, Labels], Seen]


def _attacks(runs: Sequence[Run]) -> list[str]:
    rows: dict[str, Attack] = {
        "each device's class sums of features": partial(_by_least_squares, each=True),
        "class sums of features over all devices": _by_least_squares,
        "the same, of classes with 10 photos on each of 3 devices": partial(_by_least_squares, least=10, holders=3),
        "second moments of features over all devices": partial(_linearly, logits=False),
        "each device's sums of logits": partial(_linearly, each=True),
        "each device's sums of logits, of classes with 10 photos": partial(_linearly, each=True, least=10),
        "sums of logits over all devices": _linearly,
        "sums of logits over all devices, of classes with 10 photos (default)": partial(_linearly, total=10),
    }
    lines = [
        "## Membership",
        "",
        f"Half of the {len(runs[0].all.labels)} photos, drawn at random, are in the sums of {DEVICES} devices",
        f"(Dirichlet, α = {ALPHAS[0]:g}). The attacker has all photos, and knows how many of each class are in sums.",
        "Accuracy is the mean of the shares of photos in the sums and of other photos that it tells; chance is 0.5.",
        "The last column is the share of photos whose class is in the sums. Class sums of features are attacked by",
        "non-negative least squares, second moments by the best linear estimate, sums of logits (class sums, counts",
        "and second moments) by the better of both.",
        "",
        "| what the server sees | accuracy | photos |",
        "| --- | --- | --- |",
    ]
    for text, attack in rows.items():
        found = [attack(run, _owners(run, seed)) for seed, run in enumerate(runs)]
        told, share = spread([seen.accuracy for seen in found]), statistics.mean(seen.share for seen in found)
        lines.append(f"| {text} | {told} | {share:.0%} |")
    return [
        *lines,
        "| no sums | 0.500 | |",
        "",
        "N numbers about m candidates tell about 0.5 + 0.4 · √(N / m) of them. So 0.52 takes 400 candidates for each",
        f"number: {400 * runs[0].classes} photos of a class for {runs[0].classes} logits, 150,000 for its features.",
        "",
    ]


def _owners(run: Run, seed: int) -> Labels:
    """By photo, the device whose sums it is in; -1 for the half that is in none."""
    labels = run.all.labels
    chosen = np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 2]
    owner = np.full(len(labels), -1)
    parts = by_dirichlet(labels[chosen], np.empty(0, np.int64), DEVICES, ALPHAS[0], seed).train
    for device, own in enumerate(parts):
        owner[chosen[np.asarray(own, np.int64)]] = device
    return owner


def _in_sums(run: Run, owner: Labels, least: int, holders: int, total: int) -> tuple[Labels, Bools]:
    """`owner`, -1 for photos that are in no sum, and which photos have a class that is in the sums."""
    labels = run.all.labels
    counts = np.array([np.bincount(labels[owner == device], minlength=run.classes) for device in range(DEVICES)])
    holds = counts >= max(least, 1)
    chosen = (holds.sum(axis=0) >= holders) & (counts.sum(axis=0) >= total)
    return np.where((holds & chosen)[owner, labels], owner, -1), chosen[labels]


def _by_least_squares(run: Run, owner: Labels, each: bool = False, least: int = 1, holders: int = 1) -> Seen:
    owner, part = _in_sums(run, owner, least, holders, total=1)
    return _seen(_largest_weights(run.all.features, run.all.labels, owner, part, each), owner, run.all.labels, part)


def _largest_weights(values: Doubles, labels: Labels, owner: Labels, part: Bools, each: bool) -> Doubles:
    """By non-negative least squares, each class sum of values (m, D) by itself. The weight of a photo is its largest in
    any sum."""
    weights = np.zeros(len(labels))
    for label in np.unique(labels[part]):
        own = labels == label
        sums = [owner[own] == device for device in range(DEVICES)] if each else [owner[own] >= 0]
        found = [least_squares_weights(values[own], values[own][members].sum(axis=0)) for members in sums]
        weights[own] = np.max(found, axis=0)
    return weights


def _linearly(run: Run, owner: Labels, logits: bool = True, each: bool = False, least: int = 1, total: int = 1) -> Seen:
    """Of features, second moments only, by the best linear estimate. With `each`, the weights of a photo in the sums of
    all devices are added. Of logits, by least squares if that is better: it finds the photos of small sums."""
    owner, part = _in_sums(run, owner, least, 1, total)
    photos = run.all
    gram = class_gram(photos.logits, photos.labels) + moment_gram(photos.logits)
    if not logits:
        gram = moment_gram(photos.features / np.linalg.norm(photos.features, axis=1, keepdims=True))
    groups = [owner == device for device in range(DEVICES)] if each else [owner >= 0]
    weights = [linear_weights(gram, gram @ members, float(members.mean())) for members in groups if members.any()]
    seen = _seen(np.sum(weights, axis=0), owner, photos.labels, part)
    if not logits:
        return seen
    counted = np.concatenate([photos.logits, np.ones((len(photos.labels), 1))], axis=1)
    by_squares = _seen(_largest_weights(counted, photos.labels, owner, part, each), owner, photos.labels, part)
    return max(seen, by_squares, key=lambda found: found.accuracy)


def _seen(weights: Doubles, owner: Labels, labels: Labels, part: Bools) -> Seen:
    told = balanced_accuracy(weights[part], owner[part] >= 0, labels[part]) if part.any() else 0.5
    return Seen(told, float(part.mean()))


# inversion


def _inversions(runs: Sequence[Run]) -> list[str]:
    """How much of a photo's feature is in the sum of a device that has one photo of the class, or ten."""
    rows: dict[str, list[float]] = {}
    for seed, run in enumerate(runs):
        rng, photos = np.random.default_rng(seed), run.all
        weight = run.head[: -run.classes].reshape(run.classes, -1).astype(np.float64)
        for index in rng.permutation(len(photos.labels))[:100]:
            same = np.flatnonzero(photos.labels == photos.labels[index])
            others = rng.permutation(same[same != index])
            known = photos.features[others[9:]].mean(axis=0)  # the attacker's own photos of the class
            own = photos.features[index] - known
            for count in (1, 10):
                mean = np.mean(photos.features[[index, *others[: count - 1]]], axis=0)
                from_logits = feature_from_logits(weight, weight @ mean, known)
                what = "one photo" if count == 1 else f"{count} photos"
                rows.setdefault(f"features of {what}", []).append(cosine(mean - known, own))
                rows.setdefault(f"logits of {what}", []).append(cosine(from_logits - known, own))
    lines = [
        "## Inversion",
        "",
        "How much of a photo's feature is in the class sum of one device. The attacker knows the mean feature of other",
        "photos of the class. The cosine is between the differences to it of its best guess and of the photo. An image",
        "is rebuilt by gradient from such a guess, and cannot have more of the photo than it; none was rebuilt here.",
        "",
        "| sum of | cosine, mean over 100 photos a seed |",
        "| --- | --- |",
    ]
    lines += [f"| {text} | {statistics.mean(found):.3f} |" for text, found in sorted(rows.items())]
    return [*lines, ""]


# what the head loses


def _heads(runs: Mapping[float, Sequence[Run]], without: Mapping[float, Sequence[Run]]) -> list[str]:
    """`without`: the runs without a head round."""
    lines = [
        "## The head after stage 1",
        "",
        "Accuracy of the global expert, without stage 2, on the held-out photos of all devices, which choices were",
        "made on, and on all test photos. A class that is in no sum keeps its trained row. Without sums, devices train",
        "over the classes that they hold, else over all classes.",
        "",
        "| α | head from | photos of a class on a device | devices | on all devices | classes | held-out | test |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for alpha, of_alpha in runs.items():
        for text, trained in (("no sums", without[alpha]), ("the trained head", of_alpha)):
            lines.append(_head_row(f"| {alpha:g} | {text} | | | |", trained, [(run.head, 0) for run in trained]))
        for name, logits in (("features", False), ("logits", True)):
            for threshold in THRESHOLDS:
                heads = [_head(run, logits, *threshold) for run in of_alpha]
                start = f"| {alpha:g} | {name} | {' | '.join(map(str, threshold))} |"
                lines.append(_head_row(start, of_alpha, heads))
    return lines


def _head_row(start: str, runs: Sequence[Run], heads: Sequence[tuple[Vector, int]]) -> str:
    classes = statistics.mean(count for _, count in heads)
    scores = []
    for split in ("held_out", "test"):
        each = [_right(head, run.classes, getattr(run, split)) for run, (head, _) in zip(runs, heads, strict=True)]
        scores.append(spread(each))
    return f"{start} {classes:.1f} | {' | '.join(scores)} |"


def _head(run: Run, logits: bool, least: int, holders: int, total: int) -> tuple[Vector, int]:
    """The head that the server computes, and the number of classes in the sums."""
    counts = np.array([np.bincount(photos.labels, minlength=run.classes) for photos in run.train])
    holds = counts >= least
    chosen = (holds.sum(axis=0) >= holders) & (counts.sum(axis=0) >= total)
    parts = [photos[(own & chosen)[photos.labels]] for photos, own in zip(run.train, holds, strict=True)]
    together = _joined(parts)
    values = (together.logits if logits else together.features).astype(np.float32)
    sums = class_sums(values, together.labels, run.classes)
    totals = sums["class_sums"], sums["class_counts"], second_moments(values)
    head = logit_head(run.head, *totals) if logits else discriminant_head(*totals)
    return with_former_rows(head, run.head, sums["class_counts"]), int((sums["class_counts"] > 0).sum())


def _right(head: Vector, classes: int, photos: Photos) -> float:
    predicted = photos.features @ head[:-classes].reshape(classes, -1).T + head[-classes:]
    return float(np.mean(predicted.argmax(axis=1) == photos.labels))


if __name__ == "__main__":
    app()
