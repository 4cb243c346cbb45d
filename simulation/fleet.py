"""Fleets of virtual devices, and `LocalFleet`, which computes for all of them in this process.

A virtual device is its samples, a folder for small files, and a level cap. Engine, gate and features belong to the
fleet. This is safe because devices take turns: the engine's parameters are set before each use, and features depend
only on the content of samples.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

from edge_runtime.data.features import Features, Store
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.samples import Splits, assign_new_samples
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.gate import Gate
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.engine import ResidentEngine
from simulation.store import FileStore

T = TypeVar("T")
R = TypeVar("R")


class Fleet(Protocol):
    """Virtual devices. `names`: those of the federation. `unseen`: those that are kept out of it, for evaluation.

    `seconds`: processor seconds of each device in all calls of `map` so far, over all threads.
    """

    @property
    def bundle(self) -> TaskBundle: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def unseen(self) -> Sequence[str]: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...

    def splits(self, name: str) -> Splits:
        """The samples of a device, each assigned to a split."""

    def level_cap(self, name: str) -> int:
        """The highest level that a device trains."""

    def each(
        self, function: Callable[[TrainingContext, T], R], tasks: Iterable[tuple[str, T]]
    ) -> Iterator[tuple[str, R]]:
        """Calls `function` for each device in `tasks` with its task. The results are in the order of `tasks`. Only a
        few tasks and results are in memory at a time.

        The function may run in another process. So it must not change anything but the device's state directory, and
        tasks and results should be small.
        """

    def map(self, function: Callable[[TrainingContext, T], R], tasks: Mapping[str, T]) -> dict[str, R]:
        """The results of `each` by device."""


@dataclass(frozen=True)
class VirtualDevice(TrainingContext):
    """A context whose samples are all assigned. It keeps no ledger."""

    @cached_property
    def splits(self) -> Splits:
        return self.scanned


class Devices(ABC):
    """The devices of a fleet, without their computation."""

    def __init__(
        self,
        bundle: TaskBundle,
        splits: Mapping[str, Splits],
        unseen: Collection[str] = (),
        level_caps: Mapping[str, int] | None = None,
    ) -> None:
        """`splits` of all devices, those in `unseen` too. `level_caps`: default is the bundle's highest level."""
        kept_out = set(unseen)
        self.bundle = bundle
        self.names = [name for name in splits if name not in kept_out]
        self.unseen = [name for name in splits if name in kept_out]
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._splits = splits
        self._level_caps = level_caps or {}

    def splits(self, name: str) -> Splits:
        return self._splits[name]

    def level_cap(self, name: str) -> int:
        return self._level_caps.get(name, self.bundle.manifest.levels)

    @abstractmethod
    def each(
        self, function: Callable[[TrainingContext, T], R], tasks: Iterable[tuple[str, T]]
    ) -> Iterator[tuple[str, R]]: ...

    def map(self, function: Callable[[TrainingContext, T], R], tasks: Mapping[str, T]) -> dict[str, R]:
        return dict(self.each(function, tasks.items()))


class LocalFleet(Devices):
    """All devices in one process, one after the other."""

    def __init__(
        self,
        bundle: TaskBundle,
        features: Features[Store],
        splits: Mapping[str, Splits],
        states: Path,
        threads: int,
        unseen: Collection[str] = (),
        level_caps: Mapping[str, int] | None = None,
    ) -> None:
        """`states`: folder for the devices' state directories. `threads` = 0 uses all cores."""
        super().__init__(bundle, splits, unseen, level_caps)
        self._features = features
        self._states = states
        self._engine = ResidentEngine(bundle, threads)
        self._gate = Gate(bundle, threads)

    def context(self, name: str) -> TrainingContext:
        return VirtualDevice(
            device_name=name,
            bundle=self.bundle,
            scanned=self._splits[name],
            cache=self._features,
            engine=self._engine,
            gate=self._gate,
            store=DeviceStore(self._states / name),
            level_cap=self.level_cap(name),
            report=lambda *_: None,
        )

    def each(
        self, function: Callable[[TrainingContext, T], R], tasks: Iterable[tuple[str, T]]
    ) -> Iterator[tuple[str, R]]:
        for name, task in tasks:
            started = time.process_time()
            result = function(self.context(name), task)
            self.seconds[name] += time.process_time() - started
            yield name, result

    def close(self) -> None:
        """Removes the devices' state directories."""
        shutil.rmtree(self._states, ignore_errors=True)


def compute_features(features: Features[Store], splits: Mapping[str, Splits], levels: int) -> dict[str, Splits]:
    """Assigns the unassigned samples of each device, and computes the states that devices need at levels 1 to `levels`:
    in fp16 those of the training and held-out splits, in fp32 those of the test splits."""
    for each in splits.values():
        for level in range(1, levels + 1):
            features.frozen(each.train + each.held_out, level)
            features.precise().frozen(each.test, level)
    return {
        name: assign_new_samples(each, features.pooled(each.unassigned_samples, level=1))
        for name, each in splits.items()
    }


def open_folders(bundle: TaskBundle, folders: Sequence[Path], states: Path, cache: Path, threads: int) -> LocalFleet:
    """A fleet with a device for each folder of photos or texts. `cache`: folder for all features.

    Raises InputError if a folder has no samples.
    """
    kind = reader_of(bundle).kind
    splits = {folder.name: scan_once(folder, bundle.classes, kind) for folder in folders}
    contents = sorted({sample.sha256 for each in splits.values() for sample in each.samples})
    features = Features(FileStore(cache, contents), bundle, threads)
    return LocalFleet(bundle, features, compute_features(features, splits, bundle.manifest.levels), states, threads)
