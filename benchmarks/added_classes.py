"""python -m benchmarks.added_classes: classes that are added during a run, against a run that has them from the start.

Photos and model are those of the trial. Two classes, drawn among those that several devices hold, come after stage 1:
a first session has the others, and a second one, which goes on from it as `start --from` does, has all. Results are
kept in runs/added-classes. Writes benchmarks/added_classes.md.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from benchmarks.sessions import ALPHA, DEVICES, LEVELS, MODELS, TrialPhotos, config, of_classes, predict, with_classes
from benchmarks.tables import line, spread
from edge_runtime.data.samples import Splits
from fedfmsl.common.cli import application
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Stage
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.federation import Federation
from simulation.fleet import LocalFleet
from trainer_server.config import Head, RunConfig
from trainer_server.coordinator.warm_start import WarmStart, warm_start

REPORT, RUNS = Path(__file__).with_name("added_classes.md"), Path("runs/added-classes")
ADDED, HOLDERS = 2, 2  # classes, and the devices that hold each of them at least
STAGE1_ROUNDS, ROUNDS_AFTER, STAGE2_ROUNDS = 12, 3, 5
START, BEFORE = "all classes from the start", "before the classes are added"
SUMS, TRAINED = "head of the sums", "trained head"
VARIANTS: dict[str, tuple[Head, str]] = {
    "class means of the new classes, trained head": (Head.CLASS_MEANS, TRAINED),
    "class means of the new classes, head of the sums": (Head.CLASS_MEANS, SUMS),
    "no class means, trained head (default)": (Head.ZEROS, TRAINED),
}
SPLITS = ("held_out", "test")
COLUMNS = [(model, kind) for model in MODELS for kind in ("new", "old")]
TARGET_NEW, TARGET_OLD = 0.9, 0.01

INTRODUCTION = f"""\
# Classes that are added during a run

Photos, backbone, levels and shares of the trial, with fp32 weights: {DEVICES} devices, Dirichlet α = {ALPHA}.
{ADDED} classes are drawn at random among those that {HOLDERS} or more devices hold. Their photos come after
{STAGE1_ROUNDS} rounds of stage 1 and the head round. A session with all classes goes on from there, with
{ROUNDS_AFTER} rounds of stage 1, the head round and {STAGE2_ROUNDS} rounds of stage 2. Accuracy on the devices' own
test photos, of the added classes (new) and of all others (old). Before the classes are added, old photos are told
apart among fewer classes. Before stage 2 the local expert is the global one with the device's class prior. Mean ±
standard deviation over the seeds.
Written by `python -m benchmarks.added_classes`.

The trained head was chosen on held-out photos, at one level, means of seeds 0, 1, 3 and 4, after the head round. With
class means the global expert had 0.831 on new classes and 0.834 on old ones from the trained head, and 0.787 and 0.810
from that of the sums. The run from the start had 0.871 and 0.834. A learning rate of 3e-4 instead of 1e-3 in the second
session gave 0.848 and 0.845.

*Trained head*: the second session starts with the head as stage 1 has trained it. *Head of the sums*: with the one
that was computed from sums after stage 1.
"""

Row = dict[str, float | None]  # by split, model and kind of class: "test global new"
Rows = dict[str, Row]  # by what has just ended

app = application()


@dataclass(frozen=True)
class Photos:
    """The photos of one seed. `splits`: by device, of all classes. `added`: indices of the classes that come later."""

    all: TrialPhotos
    splits: Mapping[str, Splits]
    added: tuple[int, ...]
    seed: int

    @classmethod
    def drawn(cls, photos: TrialPhotos, seed: int) -> Photos:
        splits = photos.splits(seed, LEVELS)
        holders = np.sum([each.class_counts(len(photos.bundle.classes)) > 0 for each in splits.values()], axis=0)
        drawn = np.random.default_rng([seed, ADDED]).choice(np.flatnonzero(holders >= HOLDERS), ADDED, replace=False)
        return cls(photos, splits, tuple(sorted(drawn.tolist())), seed)

    @property
    def bundle(self) -> TaskBundle:
        return self.all.bundle

    @property
    def others(self) -> list[str]:
        return [name for index, name in enumerate(self.bundle.classes) if index not in self.added]

    def fleet(self, classes: Sequence[str]) -> AbstractContextManager[LocalFleet]:
        """The devices with their photos of these classes."""
        splits = {name: of_classes(each, self.bundle.classes, classes) for name, each in self.splits.items()}
        return self.all.fleet(with_classes(self.bundle, classes), splits)


@app.command()
def added_classes(
    seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1."),
    threads: int = typer.Option(0, min=0, help="Threads; 0: one per core."),
    split: str = typer.Option("test", help="test; held_out to choose between variants, without a report."),
) -> None:
    """Measure classes that are added, and write the report."""
    photos = TrialPhotos.load(threads)
    found = [_of_split(_results(Photos.drawn(photos, seed)), split) for seed in range(seeds)]
    text = _report(found)
    if split == "test":
        write_atomically(REPORT, text.encode())
        print(REPORT)
    else:
        print(text)


def _results(photos: Photos) -> dict[str, Rows]:
    """By variant. Reads what is known."""
    path = RUNS / f"{photos.seed}.json"
    if not path.is_file():
        found = {START: _from_start(photos), **_added(photos)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found).encode())
    known: dict[str, Rows] = json.loads(path.read_bytes())
    return known


def _from_start(photos: Photos) -> Rows:
    with photos.fleet(photos.bundle.classes) as fleet:
        run = Federation(_config(photos, STAGE1_ROUNDS, Head.ZEROS), fleet)
        return {name: row for name, row in _rows(run, fleet, photos) if "round" not in name}


def _added(photos: Photos) -> dict[str, Rows]:
    with photos.fleet(photos.others) as fleet:
        run = Federation(_config(photos, STAGE1_ROUNDS, Head.ZEROS), fleet)
        while run.announced.stage is not Stage.PERSONAL:
            run.step()
        before = _measured(run, fleet, photos)
    found = {}
    for title, (head, goes_on) in VARIANTS.items():
        state = run.state
        expert = state.trained if goes_on == TRAINED else state.expert
        warm = warm_start(photos.bundle, photos.others, expert, state.sal.level, state.gate)
        found[title] = {BEFORE: before, **_second_session(photos, head, warm)}
    return found


def _second_session(photos: Photos, head: Head, warm: WarmStart) -> Rows:
    with photos.fleet(photos.bundle.classes) as fleet:
        run = Federation(_config(photos, ROUNDS_AFTER, head), fleet, warm=warm)
        return dict(_rows(run, fleet, photos))


def _rows(run: Federation, fleet: LocalFleet, photos: Photos) -> Iterator[tuple[str, Row]]:
    """After the class means, each round of stage 1, the head round, and stage 2."""
    while run.announced.stage is not Stage.EVALUATE:
        ended = run.announced
        run.step()
        titles = {Stage.STATISTICS: "class means", Stage.HEAD: "head", Stage.GLOBAL: f"round {ended.index + 1}"}
        if ended.stage in titles:
            yield titles[ended.stage], _measured(run, fleet, photos)
    yield "stage 2", _measured(run, fleet, photos)


def _measured(run: Federation, fleet: LocalFleet, photos: Photos) -> Row:
    names = fleet.bundle.classes
    added = [photos.bundle.classes[index] for index in photos.added]
    kinds = {
        "new": [index for index, name in enumerate(names) if name in added],
        "old": [index for index, name in enumerate(names) if name not in added],
    }
    row: Row = {}
    for split in SPLITS:
        predicted = predict(run, fleet, split)
        for model, kind in COLUMNS:
            found = predicted.accuracy(model, kinds[kind]) if kinds[kind] else None
            row[f"{split} {model} {kind}"] = found
    return row


def _of_split(found: Mapping[str, Rows], split: str) -> dict[str, Rows]:
    """The columns of this split, without its name."""
    return {
        title: {
            name: {f"{model} {kind}": row[f"{split} {model} {kind}"] for model, kind in COLUMNS}
            for name, row in rows.items()
        }
        for title, rows in found.items()
    }


def _config(photos: Photos, stage1_rounds: int, head: Head) -> RunConfig:
    return config(photos.seed, LEVELS, stage1_rounds=stage1_rounds, stage2_rounds=STAGE2_ROUNDS, head=head)


def _report(found: Sequence[Mapping[str, Rows]]) -> str:
    lines = [INTRODUCTION, f"Number of seeds: {len(found)}.\n"]
    head = ["after", *(f"{model}, {kind}" for model, kind in COLUMNS)]
    for title in found[0]:
        lines += [f"## {title[0].upper()}{title[1:]}", "", line(head), line(["---"] * len(head))]
        for name in found[0][title]:
            values = [[rows[title][name][f"{model} {kind}"] for rows in found] for model, kind in COLUMNS]
            lines.append(
                line(
                    [name, *(spread([x for x in each if x is not None]) if None not in each else "" for each in values)]
                )
            )
        lines.append("")
    return "\n".join([*lines, *_targets(found)]) + "\n"


def _targets(found: Sequence[Mapping[str, Rows]]) -> list[str]:
    """New classes relative to the run from the start, and what old classes lose, at the same points."""
    head = [
        "variant",
        "after",
        *(f"{model}, {what}" for model in MODELS for what in ("new ÷ start", "old − start", "old − before")),
    ]
    lines = [
        "## Against the targets",
        "",
        f"Means over the seeds. New classes should reach {TARGET_NEW:.0%} of the accuracy of the run that has them",
        f"from the start, after {ROUNDS_AFTER} rounds, and old classes should lose at most {TARGET_OLD}.",
        "",
        line(head),
        line(["---"] * len(head)),
    ]

    def mean(title: str, name: str, column: str) -> float:
        return statistics.mean(value for rows in found if (value := rows[title][name][column]) is not None)

    for title in VARIANTS:
        for name in ("head", "stage 2"):
            cells = []
            for model in MODELS:
                new, old = f"{model} new", f"{model} old"
                cells.append(f"{mean(title, name, new) / mean(START, name, new):.0%}")
                cells += [
                    f"{mean(title, name, old) - mean(other, at, old):+.3f}"
                    for other, at in ((START, name), (title, BEFORE))
                ]
            lines.append(line([title, name, *cells]))
    return lines


if __name__ == "__main__":
    app()
