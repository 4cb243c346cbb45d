"""python -m benchmarks.labelling: how many answers a device needs if it asks about the least certain photos first.

A fast simulation in NumPy on features of the frozen backbone: the head is trained as the head of a device's expert is
(class means, then AdamW), without LoRA, other devices and a gate. Photos: those of `devices.trial`. The person answers
about the training photos; accuracy is measured on the photos of other shop visits. Needs
`python -m devices.trial.assets` and `python -m export.rebuild assets/dinov2-s14.onnx assets/dinov2-s14` first. The
features are kept in runs/labelling. Writes benchmarks/labelling.md.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.aggregation import trial_bundle, trial_photos
from edge_runtime.data.inputs import reader_of
from edge_runtime.engines.sessions import open_session, run
from edge_runtime.labelling.order import margins, near_duplicates, questions
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import Floats, Labels, Vector
from fedfmsl.algorithms.class_means import class_mean_head, class_sums
from fedfmsl.algorithms.mixture import log_softmax
from fedfmsl.common.cli import application

FOLDER = Path("runs") / "labelling"
REPORT = Path(__file__).with_suffix(".md")
START = 2  # labelled photos per class at the beginning, as many as a class needs
PER_ROUND = 10  # answers between two rounds
MOST = 400  # answers
TARGETS = (50, 100, 200, 300)  # answers in a random order, whose accuracy the other orders have to reach
EPOCHS, RATE, BATCH = 20, 1e-3, 16
WAITING, FEATURE = 10_000, 768  # of the memory measurement

Picks = list[tuple[int, ...]]  # questions, as rows that get one answer
Order = Callable[[Floats, Floats, np.random.Generator], Picks]  # margins (n,), features (n, F) of the waiting photos

app = application()


@dataclass(frozen=True)
class Photos:
    features: Floats
    labels: Labels
    classes: int


def in_random_order(margin: Floats, features: Floats, random: np.random.Generator) -> Picks:
    return [(int(row),) for row in random.permutation(len(margin))[:PER_ROUND]]


def least_certain(margin: Floats, features: Floats, random: np.random.Generator) -> Picks:
    return [(int(row),) for row in np.argsort(margin, kind="stable")[:PER_ROUND]]


def k_centre(margin: Floats, features: Floats, random: np.random.Generator) -> Picks:
    """Among the 2 · PER_ROUND least certain photos, always the one farthest from all chosen ones."""
    near = np.argsort(margin, kind="stable")[: 2 * PER_ROUND]
    rows = features[near] / np.linalg.norm(features[near], axis=1, keepdims=True)
    chosen, nearest = [0], rows @ rows[0]
    while len(chosen) < min(PER_ROUND, len(near)):
        nearest[chosen] = np.inf
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, rows @ rows[chosen[-1]])
    return [(int(near[index]),) for index in chosen]


def page_one_by_one(margin: Floats, features: Floats, random: np.random.Generator) -> Picks:
    return [(question.first,) for question in questions(margin, features, PER_ROUND)]


def page_groups(margin: Floats, features: Floats, random: np.random.Generator) -> Picks:
    return [question.members for question in questions(margin, features, PER_ROUND)]


ORDERS: dict[str, Order] = {
    "random": in_random_order,
    "least certain": least_certain,
    "k-centre of the 20 least certain": k_centre,
    "page, one photo per answer": page_one_by_one,
    "page, near-duplicates together": page_groups,
}


@app.command()
def labelling(seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1.")) -> None:
    """Write benchmarks/labelling.md."""
    pool, test = _photos()
    curves = {name: [_curve(pool, test, order, seed) for seed in range(seeds)] for name, order in ORDERS.items()}
    REPORT.write_text("\n".join([*_report(curves, pool, test), "", *_cost()]) + "\n")
    print(REPORT)


def train_head(features: Floats, labels: Labels, classes: int, seed: int) -> Vector:
    """A head (C · (F + 1),) from the class means of the labelled features, trained with AdamW."""
    sums = class_sums(features, labels, classes)
    head = class_mean_head(sums["class_sums"], sums["class_counts"], float(sums["norm_sum"][0]))
    optimizer, random = AdamW(RATE, np.zeros_like(head)), np.random.default_rng(seed)
    one_hot = np.eye(classes, dtype=np.float32)[labels]
    for _ in range(EPOCHS):
        order = random.permutation(len(labels))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            error = (np.exp(log_p(head, features[rows], classes)) - one_hot[rows]) / len(rows)
            gradient = np.concatenate([(error.T @ features[rows]).ravel(), error.sum(axis=0)])
            head = optimizer.step(head, gradient)
    return head


def log_p(head: Vector, features: Floats, classes: int) -> Floats:
    """Class log-probabilities (n, C)."""
    weight, bias = head[:-classes].reshape(classes, -1), head[-classes:]
    return log_softmax(features @ weight.T + bias)


def _curve(pool: Photos, test: Photos, order: Order, seed: int) -> list[float]:
    """The test accuracy after the start and after each PER_ROUND answers."""
    random = np.random.default_rng(seed)
    given: dict[int, int] = {}
    for label in range(pool.classes):
        rows = random.permutation(np.flatnonzero(pool.labels == label))[:START]
        given |= {int(row): label for row in rows}
    accuracy = []
    for answers in range(0, MOST + 1, PER_ROUND):
        rows = np.array(list(given))
        head = train_head(pool.features[rows], np.array(list(given.values())), pool.classes, seed)
        hit = log_p(head, test.features, pool.classes).argmax(axis=1) == test.labels
        accuracy.append(float(hit.mean()))
        waiting = np.array([row for row in range(len(pool.labels)) if row not in given])
        if answers == MOST or not len(waiting):
            break
        features = pool.features[waiting]
        picks = order(margins(np.exp(log_p(head, features, pool.classes))), features, random)
        for members in picks:
            label = int(pool.labels[waiting[members[0]]])  # of the photo that is shown large
            given |= {int(waiting[member]): label for member in members}
    return accuracy


def _answers_to(curve: list[float], target: float) -> int | None:
    """The answers after which the accuracy is at least `target`; None: never."""
    return next((PER_ROUND * index for index, value in enumerate(curve) if value >= target), None)


def _report(curves: dict[str, list[list[float]]], pool: Photos, test: Photos) -> list[str]:
    mean = {name: np.array([np.mean(column) for column in zip(*each, strict=False)]) for name, each in curves.items()}
    lines = [
        "# Labelling",
        "",
        f"A simulation with features of DINOv2 ViT-S/14 at 140 px (groceries): {len(pool.labels)} photos wait for an "
        f"answer, accuracy is on {len(test.labels)} photos of other shop visits. At the start {START} photos per class "
        f"have a label. After every {PER_ROUND} answers the head is trained again, from class means with AdamW; there "
        "is no LoRA, no gate and no other device, which a real device has. Near-duplicates get the class of the photo "
        f"that is shown large, also where it is wrong. {len(next(iter(curves.values())))} seeds. Written by "
        "`python -m benchmarks.labelling`.",
        "",
        "## Answers for the same accuracy",
        "",
        "Mean over the seeds, each against its own random order. Share: answers divided by those in a random "
        "order. The target was at most 0.5.",
        "",
        "| random order | accuracy | " + " | ".join(f"{name} | share" for name in ORDERS if name != "random") + " |",
        "|---|---" + "|---" * (2 * len(ORDERS) - 2) + "|",
    ]
    for answers in TARGETS:
        targets = [curve[min(answers // PER_ROUND, len(curve) - 1)] for curve in curves["random"]]
        cells = [f"{answers} answers", f"{statistics.mean(targets):.3f}"]
        for name in ORDERS:
            if name != "random":
                found = [_answers_to(curve, target) for curve, target in zip(curves[name], targets, strict=True)]
                reached = [each for each in found if each is not None]
                lacks = f", {len(found) - len(reached)} of {len(found)} never" if len(reached) < len(found) else ""
                cells.append(f"{statistics.mean(reached):.0f}{lacks}" if reached else "never")
                cells.append(f"{statistics.mean(reached) / answers:.2f}" if reached else "–")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Accuracy after a number of answers", ""]
    shown = (0, 20, 50, 100, 150, 200, 300, 400)
    lines += ["| order | " + " | ".join(map(str, shown)) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, values in mean.items():
        row = [f"{values[min(n // PER_ROUND, len(values) - 1)]:.3f}" for n in shown]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return [*lines, "", *_groups(pool)]


def _groups(pool: Photos) -> list[str]:
    found = near_duplicates(np.arange(len(pool.labels)), pool.features, len(pool.labels))
    together = [group.members for group in found if len(group.members) > 1]
    wrong = sum(int((pool.labels[list(group)] != pool.labels[group[0]]).sum()) for group in together)
    files = sum(map(len, together))
    return [
        "## Near-duplicates",
        "",
        f"Of {len(pool.labels)} photos, {files} are in {len(together)} groups of two or more. Of another "
        f"class than the photo that is shown large: {wrong}. The page shows every photo of a group, so that a person "
        "can take one out.",
    ]


def _cost() -> list[str]:
    """Time and memory of one comparison of WAITING photos, of which nearly all differ."""
    features = np.random.default_rng(0).normal(size=(WAITING, FEATURE)).astype(np.float16)
    margin: NDArray[np.float32] = np.random.default_rng(1).random(WAITING).astype(np.float32)
    start = time.perf_counter()
    questions(margin, features, 24)
    seconds = time.perf_counter() - start
    tracemalloc.start()  # makes it slower
    questions(margin, features, 24)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return [
        "## Cost",
        "",
        f"To choose 24 questions among {WAITING:,} waiting photos with {FEATURE} values each takes {seconds:.1f} s on "
        f"one x86-64 core and at most {peak / 1e6:.0f} MB beside their features in float16 "
        f"({features.nbytes / 1e6:.0f} MB).",
    ]


def _photos() -> tuple[Photos, Photos]:
    """The waiting photos, and those that measure."""
    path = FOLDER / "features.npz"
    if not path.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        parts = trial_photos()
        classes = sorted(parts[0])
        bundle = trial_bundle(FOLDER / "bundle", classes, 0)
        reader, session = reader_of(bundle), open_session(bundle, "features.onnx", 0)
        arrays: dict[str, NDArray[Any]] = {}
        for name, part in zip(("pool", "test"), parts, strict=True):
            files = [(file, label) for label, each in enumerate(classes) for file in sorted(part.get(each, []))]
            rows = [run(session, ["pooled"], reader.batch([file]))[0][0] for file, _ in files]
            arrays |= {name: np.stack(rows), f"{name}_labels": np.array([label for _, label in files])}
        np.savez(path, allow_pickle=False, **arrays)
    with np.load(path) as found:
        pool, test, labels, test_labels = (found[each] for each in ("pool", "test", "pool_labels", "test_labels"))
    count = int(labels.max()) + 1
    return Photos(pool, labels, count), Photos(test, test_labels, count)


if __name__ == "__main__":
    app()
