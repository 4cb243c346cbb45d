"""Runs the cells of a simulation's grid, one after the other, and writes their results and tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edge_runtime.data.features import Features
from edge_runtime.data.samples import Splits, assign_splits, labels_of
from edge_runtime.training.context import Samples
from fedfmsl import __version__
from fedfmsl.common.cli import console
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import Training
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.datasets import Columns, Dataset, load_folder, load_table
from simulation.fleet import LocalFleet, compute_features
from simulation.measure import held_out_accuracy, measure
from simulation.methods import METHODS, method_of
from simulation.methods.base import MethodSettings, RoundCost, train_sizes
from simulation.participation import Participation, assign_level_caps
from simulation.partition import (
    Partition,
    Scheme,
    by_classes,
    by_dirichlet,
    by_group,
    by_quantity,
    check_minimum,
    evenly,
)
from simulation.ray_fleet import RayFleet, RayPool, import_ray
from simulation.report import write_report
from simulation.results import Cell, Result, key_of, read_results, value_of, write_result
from simulation.settings import SimulationSettings
from simulation.store import FileStore
from trainer_server.config import STAGE2, highest_level

# Part of the name of every result. Raise it with a change of code or constants that changes results within a version.
# After a change of how samples are decoded, raise edge_runtime.data.inputs.DECODING too: features are kept.
NUMERICS = 1
TEST_SHARE = 0.2
# Settings that do not change a result, and those that are in the name of its file.
ELSEWHERE = {"name", "bundle", "classes", "classes_file", "task", "images", "dataset", "threads", "ray", "address"}
GRID = {"methods", "seeds", "alpha", "learning_rate"}


def simulate(settings: SimulationSettings) -> None:
    """Writes runs/NAME. Raises FedFMSLError if an option or the data is unusable."""
    bundle = settings.open_task(settings.bundle)
    bundle.verify()
    highest_level(bundle, settings.max_level)  # raises its error before the data is read
    _check_level_caps(settings)
    if settings.ray or settings.address:
        import_ray()
    simulation = Simulation(settings, bundle, _load(settings, bundle))
    cells = simulation.todo
    for cell in cells:
        simulation.partition(cell)  # raises its errors before anything is computed
    if cells:
        with _progress("features", simulation.state_count) as advance:
            simulation.compute_features(advance)
    with _progress("rounds", len(cells) * settings.rounds) as advance:
        for cell, result in simulation.run_all(cells, lambda: advance(1)):
            console.print(_line(cell, result))
    classes, data = bundle.classes, simulation.dataset
    write_report(simulation.folder, simulation.results, settings, classes, simulation.label_counts, data.coverage)


@dataclass(frozen=True)
class Simulation:
    settings: SimulationSettings
    bundle: TaskBundle
    dataset: Dataset

    @property
    def folder(self) -> Path:
        return Path("runs") / self.settings.name

    @property
    def level(self) -> int:
        return highest_level(self.bundle, self.settings.max_level)

    @cached_property
    def cells(self) -> dict[Cell, Path]:
        """Every combination, and the file of its result."""
        settings = self.settings
        has_alpha = settings.partition in (Scheme.DIRICHLET, Scheme.QUANTITY)
        alphas = settings.alpha if has_alpha else (None,)
        grid = product(range(settings.seeds), alphas, settings.learning_rate, settings.methods)
        cells = [Cell(method, alpha, rate, seed) for seed, alpha, rate, method in grid]
        return {cell: cell.path(self.folder / "results", self._key) for cell in cells}

    @property
    def todo(self) -> list[Cell]:
        return [cell for cell, path in self.cells.items() if not path.is_file()]

    @property
    def results(self) -> list[Result]:
        return read_results(self.cells.values())

    @cached_property
    def _key(self) -> str:
        values = self.settings.model_dump(mode="json", exclude={*ELSEWHERE, *GRID})
        data = [f"{s.sha256} {s.label}" for part in (self.dataset.train, self.dataset.test) for s in part]
        contents = hashlib.sha256("\n".join(data).encode()).hexdigest()
        numerics = {"numerics": NUMERICS} if NUMERICS > 1 else {}  # the files of results at 1 lack it in their names
        return key_of({**values, "task": self.bundle.task.sha256, "data": contents, "version": __version__, **numerics})

    @cached_property
    def _store(self) -> FileStore:
        names = sorted(sample.sha256 for sample in (*self.dataset.train, *self.dataset.test))
        return FileStore(self.folder / "features", names)

    @cached_property
    def _features(self) -> Features[FileStore]:
        return Features(self._store, self.bundle, self.settings.threads, reader=self.dataset.inputs)

    @cached_property
    def _states(self) -> TemporaryDirectory[str]:
        """Of this process only: several may compute cells of one simulation."""
        return TemporaryDirectory(prefix="fedfmsl-simulation-")

    @cached_property
    def _lock(self) -> Lock:
        return Lock()

    @property
    def state_count(self) -> int:
        """The number of hidden states of all samples at all levels."""
        return self.level * (len(self.dataset.train) + len(self.dataset.test))

    def compute_features(self, advance: Callable[[int], None]) -> None:
        """All states, before devices use them. `advance` receives the number of new ones."""
        for level in range(1, self.level + 1):
            for features, samples in (
                (self._features, self.dataset.train),
                (self._features.precise(), self.dataset.test),
            ):
                for part in _parts(samples):
                    features.frozen(part, level)
                    advance(len(part))

    def partition(self, cell: Cell) -> Partition:
        """Raises ConfigError if a device has too few samples."""
        settings, dataset = self.settings, self.dataset
        devices = settings.devices + settings.unseen
        train, test = labels_of(dataset.train), labels_of(dataset.test)
        if settings.partition is Scheme.DIRICHLET:
            partition = by_dirichlet(train, test, devices, cell.alpha or 0.0, cell.seed)
        elif settings.partition is Scheme.QUANTITY:
            partition = by_quantity(train, test, devices, cell.alpha or 0.0, cell.seed)
        elif settings.partition is Scheme.PATHOLOGICAL:
            partition = by_classes(train, test, devices, settings.classes_per_device, cell.seed)
        elif settings.partition is Scheme.NATURAL:
            groups = dataset.train_groups, dataset.test_groups
            partition = by_group(train, test, *groups, devices, cell.seed)
        else:
            partition = evenly(train, test, devices, cell.seed)
        check_minimum(partition, settings.min_samples, settings.partition)
        return partition

    def label_counts(self) -> NDArray[np.int64]:
        """Training samples by device and class (K, C) of the first cell."""
        cell = next(iter(self.cells))
        return self.partition(cell).counts(labels_of(self.dataset.train), len(self.bundle.classes))

    def splits(self, cell: Cell) -> dict[str, Splits]:
        """The splits of each device. Stores the states that devices need of them."""
        partition = self.partition(cell)
        splits: dict[str, Splits] = {}
        for index, (own, tests) in enumerate(zip(partition.train, partition.test, strict=True)):
            samples = [self.dataset.train[each] for each in own], [self.dataset.test[each] for each in tests]
            splits[f"device-{index}"] = assign_splits(*samples, {})
        splits = compute_features(self._features, splits, self.level)
        held_out = tuple(sample for each in splits.values() for sample in each.held_out)
        for level in range(1, self.level + 1):  # measured in fp32 as test samples are
            self._features.precise().frozen(held_out, level)
        return splits

    def fleet(self, cell: Cell, pool: RayPool | None) -> LocalFleet | RayFleet:
        splits, settings = self.splits(cell), self.settings
        names = [*splits]
        devices = names[settings.devices :], assign_level_caps(names, settings.level_caps, cell.seed)
        key = self.cells[cell].stem
        if pool:
            return RayFleet(pool, key, splits, *devices)
        return LocalFleet(
            self.bundle, self._features, splits, Path(self._states.name) / key, settings.threads, *devices
        )

    def participation(self, cell: Cell) -> Participation:
        settings = self.settings
        return Participation(settings.fraction, settings.dropout, settings.stragglers, cell.seed)

    def method_settings(self, cell: Cell) -> MethodSettings:
        settings = self.settings
        common = {"batch_size": settings.batch_size, "seed": cell.seed}
        stage1 = Training(epochs=settings.epochs, learning_rate=cell.learning_rate, **common)
        stage2 = STAGE2.model_copy(update=common)
        return MethodSettings(settings.rounds, stage1, self.level, cell.seed, stage2, self.participation(cell))

    def run_all(self, cells: Sequence[Cell], advance: Callable[[], None]) -> Iterator[tuple[Cell, Result]]:
        """Computes cells, with Ray several at once. Yields each when it is done."""
        settings = self.settings
        if not cells or not (settings.ray or settings.address):
            for cell in cells:
                yield cell, self.run(cell, advance)
            return
        if settings.address:
            for cell in cells:  # workers of a cluster have no states that are stored after the pool is opened
                self.splits(cell)
        pool = RayPool(self.bundle, self._store, self.folder / "features", settings.threads or 1, settings.address)
        threads = ThreadPoolExecutor(len(pool.workers))
        try:
            running = {threads.submit(self.run, cell, advance, pool): cell for cell in cells}
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            pool.shutdown()  # ends the calls of cells that still run

    def run(self, cell: Cell, advance: Callable[[], None], pool: RayPool | None = None) -> Result:
        """Computes a cell and writes its file. `advance` is called after each round."""
        with self._lock:  # features of other cells may be computed in other threads
            fleet = self.fleet(cell, pool)
        settings, method = self.settings, method_of(cell.method)
        participation, sizes = self.participation(cell), train_sizes(fleet)
        state, cost = method.start(fleet, self.method_settings(cell))
        costs, participations = [cost], 0
        for index in range(settings.rounds):
            devices = participation.devices(sizes, index)
            state, cost = method.round(fleet, state, devices, index)
            costs.append(cost)
            participations += len(devices)
            advance()
        seconds = sum(fleet.seconds.values())
        result = {
            "title": method.title,
            "source": method.source,
            "rows": measure(method, fleet, state, fleet.names, settings.test_devices),
            "held_out": held_out_accuracy(method, fleet, state),
            "unseen": measure(method, fleet, state, fleet.unseen, settings.test_devices),
            **_costs(costs, seconds, participations),
        }
        state = method.adapt(fleet, state, fleet.unseen)
        result["unseen_adapted"] = measure(method, fleet, state, fleet.unseen, settings.test_devices)
        fleet.close()
        write_result(self.cells[cell], cell, result)
        return read_results([self.cells[cell]])[0]


def _check_level_caps(settings: SimulationSettings) -> None:
    """Raises ConfigError if there are level caps and a method that does not follow them."""
    unfit = [name for name in settings.methods if settings.level_caps and not method_of(name).follows_level_caps]
    if unfit:
        fit = [name for name in METHODS if method_of(name).follows_level_caps]
        raise ConfigError(
            f"--level-caps has no effect on {', '.join(unfit)}, whose devices train all blocks of the level; it is for "
            f"{', '.join(fit)}"
        )


def _load(settings: SimulationSettings, bundle: TaskBundle) -> Dataset:
    if settings.images is not None:
        return load_folder(settings.images, bundle, settings.partition is Scheme.NATURAL, TEST_SHARE)
    columns = Columns(settings.sample_column, settings.label_column, settings.group_column)
    return load_table(settings.dataset or "", bundle, columns, TEST_SHARE)


def _parts(samples: Samples, size: int = 64) -> Iterator[Samples]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _costs(costs: list[RoundCost], seconds: float, participations: int) -> dict[str, float]:
    """Means over the participations of all devices in all rounds; what the start costs is included."""
    up: Counter[str] = Counter()
    down: Counter[str] = Counter()
    for cost in costs:
        up.update(cost.bytes_up)
        down.update(cost.bytes_down)
    count = max(1, participations)
    return {
        "kilobytes_up": up.total() / 1000 / count,
        "kilobytes_down": down.total() / 1000 / count,
        "device_seconds": seconds / count,
        "participations": participations,
    }


def _line(cell: Cell, result: Result) -> str:
    """What the command prints when a cell is done."""
    measured = [(name, value_of(result, cell.method, name)) for name in ("own", "novel", "fleet", "harmonic")]
    values = " · ".join(f"{name} {value:.3f}" for name, value in measured if value is not None)
    alpha = "" if cell.alpha is None else f", α {cell.alpha:g}"
    return f"{result['title']}{alpha}, rate {cell.learning_rate:g}, seed {cell.seed}: {values}"


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left. Yields a function that receives the progress."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(what, total=total, visible=total > 0)
        yield lambda done: progress.advance(task, done)
