"""python -m benchmarks.added_classes: classes that are added during a run, against a run that has them from the start.

Photos and model are those of the trial. Two classes, drawn among those that several devices hold, come after stage 1:
a first session has the others, and a second one, which goes on from it as `start --from` does, has all. Results are
kept in runs/added-classes. Writes benchmarks/added_classes.md.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import typer

from benchmarks.evidence import build_bundle
from benchmarks.sessions import MODELS, of_classes, predict, with_classes
from benchmarks.tables import spread
from devices.trial.assets import ASSETS, PHOTOS, fetch
from devices.trial.groceries import unpack_groceries
from edge_runtime.data.features import Features, Inputs
from edge_runtime.data.samples import Splits, assign_splits, labels_of
from fedfmsl.algorithms.sal import CapabilityQueue
from fedfmsl.common.cli import application
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Stage
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.datasets import load_folder
from simulation.federation import Federation
from simulation.fleet import LocalFleet, compute_features
from simulation.partition import by_dirichlet
from simulation.run import TEST_SHARE
from simulation.store import FileStore
from trainer_server.config import STAGE1, STAGE2, Head, RunConfig, Trigger, sal_rules
from trainer_server.coordinator.warm_start import WarmStart, warm_start

REPORT, RUNS = Path(__file__).with_name("added_classes.md"), Path("runs/added-classes")
LEVELS, DEVICES, ALPHA = 3, 6, 0.5  # as in the trial
ADDED, HOLDERS = 2, 2  # classes, and the devices that hold each of them at least
STAGE1_ROUNDS, ROUNDS_AFTER, STAGE2_ROUNDS = 12, 3, 5
START, BEFORE = "all classes from the start", "before the classes are added"
SUMS, TRAINED = "head of the sums", "trained head"
VARIANTS: dict[str, tuple[Head, str]] = {
    "class means of the new classes, trained head": (Head.CLASS_MEANS, TRAINED),
    "class means of the new classes, head of the sums": (Head.CLASS_MEANS, SUMS),
    "no class means, trained head (default)": (Head.ZEROS, TRAINED),
    "no class means, head of the sums": (Head.ZEROS, SUMS),
}
COLUMNS = [(model, kind) for model in MODELS for kind in ("new", "old")]
TARGET_NEW, TARGET_OLD = 0.9, 0.01

INTRODUCTION = f"""\
# Classes that are added during a run

Photos, backbone, levels and shares of the trial: {DEVICES} devices, Dirichlet α = {ALPHA}. {ADDED} classes are drawn at
random among those that {HOLDERS} or more devices hold. Their photos come after {STAGE1_ROUNDS} rounds of stage 1 and
the head round. A session with all classes goes on from there, with {ROUNDS_AFTER} rounds of stage 1, the head round and
{STAGE2_ROUNDS} rounds of stage 2. Accuracy on the devices' own test photos, of the added classes (new) and of all
others (old). Before the classes are added, old photos are told apart among fewer classes. Before stage 2 the local
expert is the global one with the device's class prior. Mean ± standard deviation over the seeds.
Written by `python -m benchmarks.added_classes`.

*Trained head*: the second session starts with the head as stage 1 has trained it. *Head of the sums*: with the one
that was computed from sums after stage 1.
"""

Row = dict[str, float | None]  # by model and kind of class: "global new"
Rows = dict[str, Row]  # by what has just ended

app = application()


@dataclass(frozen=True)
class Photos:
    """All photos with their devices. `splits`: of all classes. `added`: indices of the classes that come later."""

    bundle: TaskBundle
    store: FileStore
    inputs: Inputs
    splits: Mapping[str, Splits]
    added: tuple[int, ...]
    seed: int
    threads: int

    @property
    def others(self) -> list[str]:
        return [name for index, name in enumerate(self.bundle.classes) if index not in self.added]

    @contextmanager
    def fleet(self, classes: Sequence[str]) -> Iterator[LocalFleet]:
        """The devices with their photos of these classes."""
        bundle = with_classes(self.bundle, classes)
        features = Features(self.store, bundle, self.threads, reader=self.inputs)
        splits = {name: of_classes(each, self.bundle.classes, classes) for name, each in self.splits.items()}
        with TemporaryDirectory(prefix="fedfmsl-added-") as states:
            yield LocalFleet(bundle, features, splits, Path(states), self.threads)


@app.command()
def added_classes(
    seeds: int = typer.Option(3, min=1, help="Seeds 0 … n-1."),
    threads: int = typer.Option(0, min=0, help="Threads; 0: one per core."),
    split: str = typer.Option("test", help="test; held_out to choose between variants, without a report."),
) -> None:
    """Measure classes that are added, and write the report."""
    found = [_results(photos, split) for photos in _all_photos(seeds, threads)]
    text = _report(found)
    if split == "test":
        write_atomically(REPORT, text.encode())
        print(REPORT)
    else:
        print(text)


def _all_photos(seeds: int, threads: int) -> Iterator[Photos]:
    images = unpack_groceries(fetch(PHOTOS), ASSETS / "groceries")
    bundle = build_bundle(Path(f"{RUNS}-bundle"), images, LEVELS)
    data = load_folder(images, bundle, False, TEST_SHARE)
    names = sorted(sample.sha256 for sample in (*data.train, *data.test))
    store = FileStore(Path(f"{RUNS}-features"), names)
    features = Features(store, bundle, threads, reader=data.inputs)
    for seed in range(seeds):
        partition = by_dirichlet(labels_of(data.train), labels_of(data.test), DEVICES, ALPHA, seed)
        splits = {
            f"device-{index}": assign_splits([data.train[row] for row in own], [data.test[row] for row in tests], {})
            for index, (own, tests) in enumerate(zip(partition.train, partition.test, strict=True))
        }
        splits = compute_features(features, splits, LEVELS)
        holders = sum((each.class_counts(len(bundle.classes)) > 0).astype(np.int64) for each in splits.values())
        drawn = np.random.default_rng([seed, ADDED]).choice(np.flatnonzero(holders >= HOLDERS), ADDED, replace=False)
        yield Photos(bundle, store, data.inputs, splits, tuple(sorted(drawn.tolist())), seed, threads)


def _results(photos: Photos, split: str) -> dict[str, Rows]:
    """By variant. Reads what is known."""
    path = RUNS / f"{photos.seed}-{split}.json"
    if not path.is_file():
        found = {START: _from_start(photos, split), **_added(photos, split)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found).encode())
    known: dict[str, Rows] = json.loads(path.read_bytes())
    return known


def _from_start(photos: Photos, split: str) -> Rows:
    with photos.fleet(photos.bundle.classes) as fleet:
        run = Federation(_config(photos, STAGE1_ROUNDS, Head.ZEROS), fleet)
        return {name: row for name, row in _rows(run, fleet, photos, split) if "round" not in name}


def _added(photos: Photos, split: str) -> dict[str, Rows]:
    with photos.fleet(photos.others) as fleet:
        run = Federation(_config(photos, STAGE1_ROUNDS, Head.ZEROS), fleet)
        while run.announced.stage is not Stage.PERSONAL:
            run.step()
        before = _measured(run, fleet, photos, split)
    found = {}
    for title, (head, goes_on) in VARIANTS.items():
        state = run.state
        expert = state.trained if goes_on == TRAINED else state.expert
        warm = warm_start(photos.bundle, photos.others, expert, state.sal.level, state.gate)
        found[title] = {BEFORE: before, **_second_session(photos, head, warm, split)}
    return found


def _second_session(photos: Photos, head: Head, warm: WarmStart, split: str) -> Rows:
    with photos.fleet(photos.bundle.classes) as fleet:
        run = Federation(_config(photos, ROUNDS_AFTER, head), fleet, warm=warm)
        return dict(_rows(run, fleet, photos, split))


def _rows(run: Federation, fleet: LocalFleet, photos: Photos, split: str) -> Iterator[tuple[str, Row]]:
    """After the class means, each round of stage 1, the head round, and stage 2."""
    while run.announced.stage is not Stage.EVALUATE:
        ended = run.announced
        run.step()
        titles = {Stage.STATISTICS: "class means", Stage.HEAD: "head", Stage.GLOBAL: f"round {ended.index + 1}"}
        if ended.stage in titles:
            yield titles[ended.stage], _measured(run, fleet, photos, split)
    yield "stage 2", _measured(run, fleet, photos, split)


def _measured(run: Federation, fleet: LocalFleet, photos: Photos, split: str) -> Row:
    predicted, names = predict(run, fleet, split), fleet.bundle.classes
    added = [photos.bundle.classes[index] for index in photos.added]
    kinds = {
        "new": [index for index, name in enumerate(names) if name in added],
        "old": [index for index, name in enumerate(names) if name not in added],
    }
    return {
        f"{model} {kind}": predicted.accuracy(model, kinds[kind]) if kinds[kind] else None for model, kind in COLUMNS
    }


def _config(photos: Photos, stage1_rounds: int, head: Head) -> RunConfig:
    stage1_sal, stage2_sal = sal_rules(Trigger.CAPABILITY_QUEUE, CapabilityQueue().min_gain, LEVELS)
    return RunConfig.model_validate(
        {
            "run": "added-classes",
            "devices": DEVICES,
            "seed": photos.seed,
            "stage1_rounds": stage1_rounds,
            "stage2_rounds": STAGE2_ROUNDS,
            "stage1": STAGE1.model_copy(update={"seed": photos.seed}),
            "stage2": STAGE2.model_copy(update={"seed": photos.seed}),
            "stage1_sal": stage1_sal,
            "stage2_sal": stage2_sal,
            "head": head,
        }
    )


def _report(found: Sequence[Mapping[str, Rows]]) -> str:
    lines = [INTRODUCTION]
    head = ["after", *(f"{model}, {kind}" for model, kind in COLUMNS)]
    for title in found[0]:
        lines += [f"## {title[0].upper()}{title[1:]}", "", _line(head), _line(["---"] * len(head))]
        for name in found[0][title]:
            values = [[rows[title][name][f"{model} {kind}"] for rows in found] for model, kind in COLUMNS]
            lines.append(
                _line(
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
        _line(head),
        _line(["---"] * len(head)),
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
            lines.append(_line([title, name, *cells]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    app()
