"""Runs with hostile devices: the attacks, and what each costs the honest ones.

The trial's photos at level 1, in one process. Features are computed once, so a run takes seconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.evidence import build_bundle
from benchmarks.tables import spread
from devices.trial.dataset import find_files, kind_of
from devices.trial.groceries import groceries
from devices.trial.shares import write_device_folders
from edge_runtime.data.features import Features
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.samples import Sample, Splits
from edge_runtime.training.stages import StageResult
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.federation import accuracies, federate, scaled
from simulation.fleet import LocalFleet, compute_features
from simulation.store import FileStore
from trainer_server.config import STAGE1, STAGE2, Aggregation, Rule, RunConfig, Trigger, sal_rules

Change = Callable[[StageResult], StageResult]
SAMPLES = 1_000_000  # the most that the server accepts
STAGE1_ROUNDS, STAGE2_ROUNDS = 6, 2
MODELS = ("global", "mofm")
FLEETS = ((6, 1), (10, 2))  # devices, and how many of them are hostile
ALPHA, SIZE = 0.5, 70
FOLDER, RESULTS = Path("runs") / "aggregation", Path(__file__).with_name("aggregation")
Result = Mapping[str, dict[str, float]]


@dataclass(frozen=True)
class Attack:
    """`change`: of everything that a hostile device sends. `flips_labels`: it also trains on the labels of the next
    class."""

    text: str
    change: Change
    flips_labels: bool = False


@dataclass(frozen=True)
class Row:
    """`absent`: the hostile devices take no part."""

    text: str
    aggregation: Aggregation
    attack: Attack | None = None
    absent: bool = False


def sign_flipped(result: StageResult) -> StageResult:
    return scaled(result, -1.0)


def inflated(result: StageResult) -> StageResult:
    return replace(scaled(result, -1.0), samples=SAMPLES)


def false_accuracies(result: StageResult) -> StageResult:
    """Everything else is honest, but for the samples, by which accuracies are weighted."""
    lies = {name: 1.0 for name in result.metrics if name.startswith("held_out")}
    return replace(result, samples=SAMPLES, metrics={**result.metrics, **lies})


def poisoned_statistics(result: StageResult) -> StageResult:
    """Sums of the next class, as of a thousand times the samples. They agree with each other."""
    if "class_sums" not in result.tensors:
        return result
    sums = {name: np.asarray(1000 * tensor, np.float32) for name, tensor in result.tensors.items()}
    for name in ("class_sums", "class_counts"):
        sums[name] = np.roll(sums[name], 1, axis=0)
    return replace(result, tensors=sums, samples=SAMPLES)


def not_a_number(result: StageResult) -> StageResult:
    if result.delta is None:
        return result
    return replace(result, delta=np.full_like(result.delta, np.nan))


def gate_only(result: StageResult) -> StageResult:
    """−10 times the update of the gate adapter."""
    return scaled(result, -10.0) if "held_out_mofm" in result.metrics else result


ATTACKS = {
    "scaled": Attack("update × −10", partial(scaled, factor=-10.0)),
    "sign-flipped": Attack("sign flipped", sign_flipped),
    "label-flipped": Attack("labels flipped", lambda result: result, flips_labels=True),
    "inflated": Attack("sign flipped, 1,000,000 samples", inflated),
    "accuracies": Attack("accuracies of 1, 1,000,000 samples", false_accuracies),
    "statistics": Attack("statistics and head sums of wrong classes, × 1000", poisoned_statistics),
    "nan": Attack("updates of NaN", not_a_number),
    "gate": Attack("gate update × −10", gate_only),
}


def rows() -> dict[str, Row]:
    """By name: the paper's mean and the default without an attacker, the default without the hostile devices, then each
    attack on the default."""
    bounds = Aggregation()
    mean = Aggregation(rule=Rule.MEAN, norm_factor=None, weight_cap=None)
    quiet = {
        "mean": Row("mean as in the paper, nobody hostile", mean),
        "default": Row("default, nobody hostile", bounds),
        "absent": Row("nothing: they take no part", bounds, absent=True),
    }
    return quiet | {name: Row(attack.text, bounds, attack) for name, attack in ATTACKS.items()}


def run_missing(seeds: int, threads: int) -> None:
    """Computes the cells that have no result yet, seed by seed, and stores each."""
    images = groceries()
    bundle = build_bundle(FOLDER / "hostile-bundle", images, 1, size=SIZE)
    photos = find_files(images, kind_of(images))
    for seed in range(seeds):
        for devices, hostile in FLEETS:
            folder = FOLDER / f"hostile-samples-{devices}-{seed}"
            missing = {name: row for name, row in rows().items() if not _path(devices, name, seed).is_file()}
            if missing and not folder.is_dir():
                write_device_folders(*photos, folder, devices, ALPHA, seed)
            for name, row in missing.items():
                started = time.monotonic()
                result = _run(bundle, sorted(folder.iterdir()), row, seed, hostile, threads)
                write_atomically(_path(devices, name, seed), json.dumps(result, indent=1).encode())
                seconds = time.monotonic() - started
                print(f"{devices} devices, {name}, seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)


def report() -> list[str]:
    """A table for each fleet."""
    lines = [
        "## Hostile devices",
        "",
        f"Groceries, DINOv2 ViT-S/14 at {SIZE} px, level 1, Dirichlet α = {ALPHA}, {STAGE1_ROUNDS} + {STAGE2_ROUNDS} "
        "rounds. Accuracy on the test samples of the honest devices, weighted by their number: mean ± standard "
        "deviation over the seeds. Difference: mean difference to the default without a hostile device, with the same "
        "seeds, devices and samples. The attackers act in every round of both stages.",
    ]
    for devices, hostile in FLEETS:
        lines += ["", f"### {hostile} of {devices} devices", ""]
        lines += [
            "| what hostile devices send | seeds | global | difference | mofm | difference |",
            "|---|---|---|---|---|---|",
        ]
        reference = _results(devices, "default")
        for name, row in rows().items():
            found = {seed: result for seed, result in _results(devices, name).items() if seed in reference}
            cells = [row.text, ", ".join(map(str, found)) or "not run"]
            for model in MODELS if found else ():
                values = {seed: _accuracy(result, model, hostile) for seed, result in found.items()}
                gained = [value - _accuracy(reference[seed], model, hostile) for seed, value in values.items()]
                cells += [spread([*values.values()]), f"{statistics.mean(gained):+.3f}"]
            lines.append(f"| {' | '.join([*cells, *[''] * (6 - len(cells))])} |")
    return lines


def _path(devices: int, name: str, seed: int) -> Path:
    return RESULTS / f"{devices}-{name}-seed-{seed}.json"


def _results(devices: int, name: str) -> dict[int, Result]:
    """By seed."""
    paths = sorted(RESULTS.glob(f"{devices}-{name}-seed-[0-9].json"))
    return {int(path.stem[-1]): json.loads(path.read_text()) for path in paths}


def _accuracy(result: Result, model: str, hostile: int) -> float:
    """Mean over the test samples of the devices that are honest in every row of the fleet."""
    honest = [found for name, found in result.items() if name not in _names(hostile)]
    return sum(each[model] * each["test"] for each in honest) / sum(each["test"] for each in honest)


def _names(hostile: int) -> frozenset[str]:
    return frozenset(f"device-{index}" for index in range(hostile))


def _run(bundle: TaskBundle, folders: Sequence[Path], row: Row, seed: int, hostile: int, threads: int) -> Result:
    """By device: the accuracies of MODELS on its test samples, and their number."""
    attack = row.attack
    bad = _names(hostile) if attack is not None else frozenset()

    def tamper(device: str, result: StageResult) -> StageResult:
        return attack.change(result) if attack is not None and device in bad else result

    kind = reader_of(bundle).kind
    splits = {folder.name: scan_once(folder, bundle.classes, kind) for folder in folders}
    contents = sorted({sample.sha256 for each in splits.values() for sample in each.samples})
    if row.absent:
        splits = {name: each for name, each in splits.items() if name not in _names(hostile)}
    if attack is not None and attack.flips_labels:
        splits |= {name: _flipped(splits[name], len(bundle.classes)) for name in bad}
    features = Features(FileStore(FOLDER / "hostile-cache", contents), bundle, threads)
    splits = compute_features(features, splits, bundle.manifest.levels)
    with TemporaryDirectory(prefix="fedfmsl-hostile-") as states:
        fleet = LocalFleet(bundle, features, splits, Path(states), threads)
        history = federate(_config(len(splits), row.aggregation, seed), fleet, tamper, hostile=bad)
    return accuracies(history, MODELS)


def _config(devices: int, aggregation: Aggregation, seed: int) -> RunConfig:
    stage1_sal, stage2_sal = sal_rules(Trigger.CAPABILITY_QUEUE, 0.02, 1)
    return RunConfig.model_validate(
        {
            "run": "hostile",
            "devices": devices,
            "stage1_rounds": STAGE1_ROUNDS,
            "stage2_rounds": STAGE2_ROUNDS,
            "stage1": STAGE1.model_copy(update={"seed": seed}),
            "stage2": STAGE2.model_copy(update={"seed": seed}),
            "stage1_sal": stage1_sal,
            "stage2_sal": stage2_sal,
            "aggregation": aggregation,
            "seed": seed,
        }
    )


def _flipped(splits: Splits, classes: int) -> Splits:
    """Each training and held-out sample with the label of the next class. Test samples keep theirs."""

    def flip(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        return tuple(replace(sample, label=(sample.label + 1) % classes) for sample in samples)

    return replace(splits, train=flip(splits.train), held_out=flip(splits.held_out))
