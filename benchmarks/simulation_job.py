"""The federated job of `benchmarks.simulation`: its data, its description for Flower, and its run in our simulator."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from edge_runtime.data.features import Features
from edge_runtime.data.samples import Sample, Splits, assign_splits, labels_of
from edge_runtime.training.context import Samples
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.bundle import ImagePreprocessing
from fedfmsl.protocol.messages import Training
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.datasets import Dataset, load_folder
from simulation.fleet import LocalFleet, compute_features
from simulation.methods.base import MethodSettings, round_seed
from simulation.methods.fedit import FedIT
from simulation.methods.local_training import shuffled_steps
from simulation.methods.server import start_theta
from simulation.participation import Participation
from simulation.partition import by_dirichlet
from simulation.store import FileStore

TEST_SHARE = 0.2


@dataclass(frozen=True)
class Job:
    """`features`: folder of the hidden states. All else is as in `simulation.settings`."""

    bundle: str
    images: str
    features: str
    weights: str
    rounds: int
    level: int = 1
    devices: int = 100
    fraction: float = 0.1
    alpha: float = 0.5
    epochs: int = 2
    learning_rate: float = 2e-3
    seed: int = 0
    threads: int = 0

    @property
    def settings(self) -> MethodSettings:
        """One learning rate in all rounds."""
        training = Training(epochs=self.epochs, learning_rate=self.learning_rate, seed=self.seed)
        return MethodSettings(self.rounds, training, self.level, self.seed, training)

    @property
    def participation(self) -> Participation:
        return Participation(self.fraction, seed=self.seed)


class LoadedJob:
    """A job with its data set."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.bundle = TaskBundle.load(Path(job.bundle))
        self.data: Dataset = load_folder(Path(job.images), self.bundle, False, TEST_SHARE)
        names = sorted(sample.sha256 for sample in (*self.data.train, *self.data.test))
        self.features = Features(
            FileStore(Path(job.features), names), self.bundle, job.threads, reader=self.data.inputs
        )

    @cached_property
    def splits(self) -> dict[str, Splits]:
        """The splits of all devices, without test samples. Computes the features that the simulator needs."""
        job, train = self.job, self.data.train
        partition = by_dirichlet(labels_of(train), labels_of(self.data.test), job.devices, job.alpha, job.seed)
        splits = {
            f"device-{index}": assign_splits([train[row] for row in own], [], {})
            for index, own in enumerate(partition.train)
        }
        for level in range(1, job.level + 1):
            self.features.frozen(train, level)  # of all devices at once, as `simulate` does
        return compute_features(self.features, splits, job.level)

    def fleet(self, states: Path) -> LocalFleet:
        return LocalFleet(self.bundle, self.features, self.splits, states, self.job.threads)

    def participants(self) -> Iterator[tuple[int, list[str]]]:
        """Each round, from 0, and its devices."""
        sizes = {name: len(splits.train) for name, splits in self.splits.items()}
        for index in range(self.job.rounds):
            yield index, list(self.job.participation.devices(sizes, index))

    def accuracy(self, theta: Vector) -> float:
        """On the test split, with states in fp32. `theta` (P,) of any level."""
        with tempfile.TemporaryDirectory() as states:
            context = LocalFleet(self.bundle, self.features, self.splits, Path(states), self.job.threads).context(
                "device-0"
            )
            tests: Samples = self.data.test
            log_p = context.precise().log_p(tests, theta, np.zeros(context.classes, np.float32))
        return float((log_p.argmax(axis=1) == labels_of(tests)).mean())


def write_for_flower(loaded: LoadedJob, folder: Path, levels: tuple[int, ...]) -> None:
    """Writes what `benchmarks.flower_simulation` reads.

    pixels.npy (n, 3, S, S) fp32, normalized, and labels.npy (n,): the training images of all devices.
    start-<level>.npy (P,): the trainables that the first round starts from.
    job.json: model and training; by device the number of its `samples` and the `bias` (C,) of its logits; by round and
    device the rows of the images in each step.
    """
    from export.reference import normalize_pixels  # imports torch, which the measured run does not need

    job, bundle, settings = loaded.job, loaded.bundle, loaded.job.settings
    preprocessing = bundle.manifest.preprocessing
    assert isinstance(preprocessing, ImagePreprocessing)
    samples = [sample for splits in loaded.splits.values() for sample in splits.train]
    rows = {sample.sha256: row for row, sample in enumerate(samples)}
    shape = (len(samples), 3, preprocessing.size, preprocessing.size)
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", mode="w+", dtype=np.float32, shape=shape)
    for row, sample in enumerate(samples):
        pixels[row] = normalize_pixels(loaded.data.inputs.batch([sample])["pixels"], preprocessing)[0].numpy()
    np.save(folder / "labels.npy", labels_of(samples))

    def steps(name: str, index: int) -> list[list[int]]:
        own: tuple[Sample, ...] = loaded.splits[name].train
        chosen = shuffled_steps(len(own), settings.training, round_seed(settings, name, index))
        return [[rows[own[each].sha256] for each in step] for step in chosen]

    with tempfile.TemporaryDirectory() as states:
        fleet = loaded.fleet(Path(states))
        for level in levels:
            theta = start_theta(fleet, MethodSettings(job.rounds, settings.training, level, job.seed))[0]
            np.save(folder / f"start-{level}.npy", theta)
        description = {
            "weights": job.weights,
            **bundle.manifest.lora.model_dump(),
            "layout": [slot.name for slot in bundle.expert.slots],
            "classes": len(bundle.classes),
            "devices": job.devices,
            "learning_rate": job.learning_rate,
            "weight_decay": settings.training.weight_decay,
            "samples": {name: len(splits.train) for name, splits in loaded.splits.items()},
            "bias": {name: fleet.context(name).class_mask.tolist() for name in fleet.names},
            "rounds": [{name: steps(name, index) for name in names} for index, names in loaded.participants()],
        }
    (folder / "job.json").write_text(json.dumps(description))


def run(job: Job, out: Path) -> None:
    """Our simulator's run. Prints marks and writes theta-<round>.npy."""
    loaded = LoadedJob(job)
    _ = loaded.splits
    _mark("features")
    states = out / "states"
    fleet, method = loaded.fleet(states), FedIT()
    state, _ = method.start(fleet, job.settings)
    np.save(out / "theta-0.npy", state.shared)
    _mark("round 0")
    before = sum(fleet.seconds.values())
    for index, names in loaded.participants():
        state, _ = method.round(fleet, state, names, index)
        np.save(out / f"theta-{index + 1}.npy", state.shared)
        _mark(f"round {index + 1}", sum(fleet.seconds.values()) - before)
    fleet.close()


def command(job: Job, out: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.simulation_job", json.dumps(asdict(job)), str(out)]


def _mark(name: str, seconds: float = 0.0) -> None:
    print(json.dumps({"name": name, "training": seconds}), flush=True)


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])), Path(sys.argv[2]))
