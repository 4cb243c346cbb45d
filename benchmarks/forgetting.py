"""python -m benchmarks.forgetting: what a standing run forgets when users delete photos, and whether a rehearsal helps.

Photos and model are those of the trial. A run is trained on half of the photos of all classes. Then each night is a
session that goes on from the one before, with new photos of half of the classes only; all other photos are deleted. A
rehearsal keeps the hidden states and labels of a few deleted photos of each class on the device, and trains with them
as with photos. Results are kept in runs/forgetting. Writes benchmarks/forgetting.md.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import typer

from benchmarks.sessions import ALPHA, DEVICES, MODELS, TrialPhotos, config, predict
from benchmarks.tables import line, spread
from edge_runtime.data.samples import Sample, Splits
from fedfmsl.common.cli import application
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Stage
from simulation.federation import Federation
from trainer_server.coordinator.warm_start import WarmStart, warm_start

REPORT, RUNS = Path(__file__).with_name("forgetting.md"), Path("runs/forgetting")
LEVEL = 1
NIGHTS, SHOWN = 8, 7  # classes that a night has photos of
FIRST, NIGHTLY = (12, 5), (2, 1)  # rounds of stages 1 and 2, of the first run and of a night
EVERYTHING = -1
VARIANTS = {
    "nothing is deleted": EVERYTHING,
    "no rehearsal": 0,
    "rehearsal of 2": 2,
    "rehearsal of 5": 5,
    "rehearsal of 10": 10,
}
KINDS = ("shown", "old")

INTRODUCTION = f"""\
# Forgetting

Photos, backbone and shares of the trial, with fp32 weights, at one SAL level: {DEVICES} devices, Dirichlet
α = {ALPHA}. Half of each device's photos train a run of {FIRST[0]} rounds of stage 1 and {FIRST[1]} of stage 2.
Then {NIGHTS} nights follow. A night has the other half of the photos of {SHOWN} classes, drawn for all devices, and
{NIGHTLY[0]} rounds of stage 1, the head round and {NIGHTLY[1]} round of stage 2. All other photos are deleted. A
*rehearsal of n* (`--rehearse n`) keeps the hidden states of up to n deleted photos of each class on each device, all
of its training split; they take part in all that the device computes from that split. Accuracy on the devices' own
test photos: of the classes of the night (shown), and of all others (old). Mean ± standard deviation over the seeds.
Written by `python -m benchmarks.forgetting`.
"""

Night = dict[str, float]  # by model and kind: "global old"

app = application()


@dataclass(frozen=True)
class Photos:
    """The photos of one seed. `splits`: all of each device. `first`: contents of those that the first run has. `shown`:
    by night the classes that have photos."""

    all: TrialPhotos
    splits: Mapping[str, Splits]
    first: frozenset[str]
    shown: Sequence[frozenset[int]]
    seed: int

    @classmethod
    def drawn(cls, photos: TrialPhotos, seed: int) -> Photos:
        splits, classes = photos.splits(seed, LEVEL), len(photos.bundle.classes)
        first = frozenset(
            sample.sha256
            for each in splits.values()
            for part in (each.train, each.held_out)
            for label in range(classes)
            for sample in [sample for sample in part if sample.label == label][::2]
        )
        rng = np.random.default_rng([seed, NIGHTS])
        shown = [frozenset(rng.choice(classes, SHOWN, replace=False).tolist()) for _ in range(NIGHTS)]
        return cls(photos, splits, first, shown, seed)


@app.command()
def forgetting(
    seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1."),
    threads: int = typer.Option(0, min=0, help="Threads; 0: one per core."),
) -> None:
    """Measure what nights with other classes do to the models, and write the report."""
    photos = TrialPhotos.load(threads)
    found = [_results(Photos.drawn(photos, seed)) for seed in range(seeds)]
    write_atomically(REPORT, _report(found).encode())
    print(REPORT)


def _results(photos: Photos) -> dict[str, list[Night]]:
    """By variant, for each night, and first after the first run. Reads what is known."""
    found = {}
    warm, start = None, None
    for title, kept in VARIANTS.items():
        path = RUNS / f"{photos.seed}-{kept}.json"
        if not path.is_file():
            if warm is None:
                warm, start = _first_run(photos)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps([start, *_nights(photos, warm, kept)]).encode())
        found[title] = json.loads(path.read_bytes())
    return found


def _first_run(photos: Photos) -> tuple[WarmStart, Night]:
    return _session(photos, _of_first_run(photos), FIRST, None, photos.shown[0])


def _nights(photos: Photos, warm: WarmStart, kept: int) -> Iterator[Night]:
    present = _of_first_run(photos)
    for shown in photos.shown:
        news = _of_night(photos, shown)
        present = {name: _with_news(present[name], news[name], kept) for name in news}
        warm, night = _session(photos, present, NIGHTLY, warm, shown)
        yield night


def _of_first_run(photos: Photos) -> dict[str, Splits]:
    return {name: _chosen(each, lambda sample: sample.sha256 in photos.first) for name, each in photos.splits.items()}


def _of_night(photos: Photos, shown: frozenset[int]) -> dict[str, Splits]:
    def is_new(sample: Sample) -> bool:
        return sample.label in shown and sample.sha256 not in photos.first

    return {name: _chosen(each, is_new) for name, each in photos.splits.items()}


def _with_news(present: Splits, news: Splits, kept: int) -> Splits:
    """The photos of tonight, and those of the former ones that are not deleted or are rehearsed."""

    def part(new: Sequence[Sample], old: Sequence[Sample]) -> tuple[Sample, ...]:
        contents = {sample.sha256 for sample in new}
        former = [sample for sample in old if sample.sha256 not in contents]
        if kept != EVERYTHING:
            former = [
                sample
                for label in sorted({sample.label for sample in former})
                for sample in [each for each in former if each.label == label][:kept]
            ]
        return (*new, *former)

    held_out = part(news.held_out, present.held_out) if kept == EVERYTHING else news.held_out
    return replace(news, train=part(news.train, present.train), held_out=held_out)


def _chosen(splits: Splits, is_chosen: Callable[[Sample], bool]) -> Splits:
    """The training and held-out samples that are chosen, of classes with both; all test samples."""
    train, held_out = ([sample for sample in part if is_chosen(sample)] for part in (splits.train, splits.held_out))
    both = {sample.label for sample in train} & {sample.label for sample in held_out}
    train, held_out = ([sample for sample in part if sample.label in both] for part in (train, held_out))
    return replace(splits, train=tuple(train), held_out=tuple(held_out))


def _session(
    photos: Photos, splits: Mapping[str, Splits], rounds: tuple[int, int], warm: WarmStart | None, shown: frozenset[int]
) -> tuple[WarmStart, Night]:
    """The start of the next session, and accuracies."""
    bundle, (stage1_rounds, stage2_rounds) = photos.all.bundle, rounds
    with photos.all.fleet(bundle, splits) as fleet:
        devices = {"devices": len(fleet.names), "stage1_rounds": stage1_rounds, "stage2_rounds": stage2_rounds}
        run = Federation(config(photos.seed, LEVEL, **devices), fleet, warm=warm)
        while run.announced.stage is not Stage.EVALUATE:
            run.step()
        predicted = predict(run, fleet, "test")
    old = set(range(len(bundle.classes))) - shown
    night = {
        f"{model} {kind}": predicted.accuracy(model, sorted(classes))
        for model in MODELS
        for kind, classes in zip(KINDS, (shown, old), strict=True)
    }
    state = run.state
    return warm_start(bundle, bundle.classes, state.trained, state.sal.level, state.gate), night


def _report(found: Sequence[Mapping[str, Sequence[Night]]]) -> str:
    lines = [INTRODUCTION, f"Number of seeds: {len(found)}.\n"]
    for model in MODELS:
        head = ["night", *(f"{title}, {kind}" for title in VARIANTS for kind in KINDS)]
        lines += [f"## {model[0].upper()}{model[1:]}", "", line(head), line(["---"] * len(head))]
        for night in range(NIGHTS + 1):
            each = [[run[title][night][f"{model} {kind}"] for run in found] for title in VARIANTS for kind in KINDS]
            lines.append(line([str(night) if night else "first run", *(f"{statistics.mean(x):.3f}" for x in each)]))
        each = [
            [statistics.mean(night[f"{model} {kind}"] for night in run[title][1:]) for run in found]
            for title in VARIANTS
            for kind in KINDS
        ]
        lines += [line(["mean of the nights", *map(spread, each)]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    app()
