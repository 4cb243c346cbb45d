"""Runs with hostile devices: the attacks, and what each costs the honest ones.

The trial's photos at level 1, in one process. Features are computed once, so a run takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edge_runtime.data.features import Features
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.samples import Sample, Splits
from edge_runtime.training.stages import StageResult
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Stage
from simulation.federation import accuracies, federate, scaled
from simulation.fleet import LocalFleet, compute_features
from simulation.store import FileStore
from trainer_server.config import STAGE1, STAGE2, Aggregation, RunConfig, Trigger, sal_rules
from trainer_server.coordinator.records import successful_rounds

Change = Callable[[StageResult], StageResult]
SAMPLES = 1_000_000  # the most that the server accepts
STAGE1_ROUNDS, STAGE2_ROUNDS = 12, 5
MODELS = ("global", "mofm")
HELD_OUT = ("held_out_global_prior", "held_out_mofm")


@dataclass(frozen=True)
class Attack:
    """`change`: of everything that a hostile device sends. `flips_labels`: it also trains on the labels of the next
    class."""

    text: str
    change: Change
    flips_labels: bool = False


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
    if not result.tensors:
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


def run_attack(
    bundle: Bundle,
    folders: Sequence[Path],
    cache: Path,
    aggregation: Aggregation,
    seed: int,
    attack: Attack | None = None,
    hostile: int = 0,
    threads: int = 1,
) -> Mapping[str, dict[str, float]]:
    """By device: the accuracies of MODELS on its test samples, those at the end of stage 2 on its held-out samples, and
    the number of both. The first `hostile` devices attack."""
    names = [folder.name for folder in folders]
    bad = frozenset(names[:hostile])

    def tamper(device: str, result: StageResult) -> StageResult:
        return attack.change(result) if attack is not None and device in bad else result

    kind = reader_of(bundle).kind
    splits = {folder.name: scan_once(folder, bundle.manifest.classes, kind) for folder in folders}
    contents = sorted({sample.sha256 for each in splits.values() for sample in each.samples})
    if attack is not None and attack.flips_labels:
        splits |= {name: _flipped(splits[name], len(bundle.manifest.classes)) for name in bad}
    features = Features(FileStore(cache, contents), bundle, threads)
    splits = compute_features(features, splits, bundle.manifest.levels)
    with TemporaryDirectory(prefix="fedfmsl-hostile-") as states:
        fleet = LocalFleet(bundle, features, splits, Path(states), threads)
        history = federate(_config(len(names), aggregation, seed), fleet, tamper, hostile=bad)
    last = successful_rounds(history.rounds, Stage.PERSONAL)[-1].updates
    held_out = {
        name: {"held_out": float(update.samples), **{key: update.metrics[key] for key in HELD_OUT}}
        for name, update in last.items()
        if name not in bad
    }
    tested = accuracies(history, MODELS)
    return {name: {**tested[name], **held_out[name]} for name in held_out}


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
