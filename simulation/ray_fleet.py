"""Fleets on Ray: devices in worker processes on this machine, or on the machines of a cluster.

A device of a fleet always has the same worker, because its state directory is on the worker's machine. On one machine
all workers read the same files of features. On a cluster they read Ray's object store, which has a copy on each
machine; the bundle is at the same path on all of them.
"""

from __future__ import annotations

import socket
import tempfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_runtime.data.features import Features, Store
from edge_runtime.data.samples import Splits
from edge_runtime.training.context import TrainingContext
from fedfmsl.errors import ConfigError, FedFMSLError, one_line
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from simulation.fleet import Devices, LocalFleet
from simulation.store import ArrayStore, FileStore

T = TypeVar("T")
R = TypeVar("R")
REACH_SECONDS = 5.0
CALLS_AHEAD = 8  # of each worker; more would keep more results in memory
LOCAL = "local"  # Ray's name for a new instance on this machine


def import_ray() -> Any:
    """Raises ConfigError if Ray is not installed."""
    try:
        import ray  # an optional dependency
    except ImportError as error:
        raise ConfigError("--ray and --address need the package ray: pip install 'fedfmsl-edge[ray]'") from error
    return ray


def _check_reachable(address: str) -> None:
    """Raises OSError. Ray itself waits for minutes, and logs its tries."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()


@dataclass(frozen=True)
class Recipe:
    """What a worker opens. `arrays`: by folder of the store, a reference to `StoredRows`; None: the worker reads the
    files below `features`, which are those of `names`."""

    bundle: Path
    task: bytes
    threads: int
    features: Path
    names: Sequence[str]
    arrays: Mapping[str, Any] | None


class Worker:
    """A process that computes for devices of any number of fleets. `key` names a fleet."""

    def __init__(self, recipe: Recipe) -> None:
        self._threads = recipe.threads
        self._bundle = TaskBundle(Bundle.load(recipe.bundle), Task.unpack(recipe.task))
        store: Store
        if recipe.arrays is None:
            store = FileStore(recipe.features, recipe.names)
        else:  # on another machine, where the folder of features does not exist
            ray = import_ray()
            store = ArrayStore({folder: ray.get(rows) for folder, rows in recipe.arrays.items()})
        self._features = Features(store, self._bundle, recipe.threads)
        self._states = tempfile.TemporaryDirectory(prefix="fedfmsl-simulation-")
        self._fleets: dict[str, LocalFleet] = {}

    def open(self, key: str, splits: Mapping[str, Splits], level_caps: Mapping[str, int]) -> None:
        states = Path(self._states.name) / key
        self._fleets[key] = LocalFleet(
            self._bundle, self._features, splits, states, self._threads, level_caps=level_caps
        )

    def close(self, key: str) -> None:
        self._fleets.pop(key).close()

    def compute(self, key: str, function: Callable[[TrainingContext, T], R], name: str, task: T) -> tuple[R, float]:
        """The result of a device, and its processor seconds."""
        fleet = self._fleets[key]
        fleet.seconds.clear()
        return fleet.map(function, {name: task})[name], fleet.seconds[name]


class RayPool:
    """The workers of a simulation: one for each core of this machine, or of the cluster at `address`, divided by
    `threads`. `features`: the folder of the store."""

    def __init__(self, bundle: TaskBundle, store: FileStore, features: Path, threads: int, address: str | None) -> None:
        """Raises ConfigError if Ray is not installed or cannot be reached."""
        self._ray = import_ray()
        try:
            if address:
                _check_reachable(address)
                self._ray.init(address=address, log_to_driver=False)
            else:
                self._ray.init(address=LOCAL, include_dashboard=False, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--address {address or LOCAL}: Ray cannot be reached ({one_line(error)}); start it, or correct the "
                "address"
            ) from error
        self.bundle = bundle
        arrays = None
        if address:
            arrays = {folder: self._ray.put(rows) for folder, rows in store.arrays().items()}
        recipe = self._ray.put(
            Recipe(bundle.root.resolve(), bundle.task.blob, threads, features.resolve(), store.names, arrays)
        )
        count = max(1, int(self._ray.cluster_resources()["CPU"]) // threads)
        worker = self._ray.remote(num_cpus=threads)(Worker)
        self.workers = [worker.remote(recipe) for _ in range(count)]

    def put(self, value: Any) -> Any:
        return self._ray.put(value)

    def get(self, references: Sequence[Any]) -> list[Any]:
        """Raises the error of the first call that failed."""
        try:
            return list(self._ray.get(list(references)))
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FedFMSLError):
                raise error.cause from None
            raise

    def shutdown(self) -> None:
        self._ray.shutdown()


class RayFleet(Devices):
    """Devices whose tasks run in the workers of a pool. `key` names the fleet in the pool."""

    def __init__(
        self,
        pool: RayPool,
        key: str,
        splits: Mapping[str, Splits],
        unseen: Collection[str] = (),
        level_caps: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(pool.bundle, splits, unseen, level_caps)
        self._pool = pool
        self._key = key
        self._worker = {name: pool.workers[turn % len(pool.workers)] for turn, name in enumerate(splits)}
        given = pool.put(dict(splits)), pool.put(self._level_caps)
        pool.get([worker.open.remote(key, *given) for worker in pool.workers])

    def each(
        self, function: Callable[[TrainingContext, T], R], tasks: Iterable[tuple[str, T]]
    ) -> Iterator[tuple[str, R]]:
        called, calls, last, given = self._pool.put(function), deque[tuple[str, Any]](), None, None
        for name, task in tasks:
            if task is not last:  # most calls of a round have the same task
                last, given = task, self._pool.put(task)
            calls.append((name, self._worker[name].compute.remote(self._key, called, name, given)))
            if len(calls) > CALLS_AHEAD * len(self._pool.workers):
                yield self._result(*calls.popleft())
        while calls:
            yield self._result(*calls.popleft())

    def _result(self, name: str, call: Any) -> tuple[str, Any]:
        ((result, seconds),) = self._pool.get([call])
        self.seconds[name] += seconds
        return name, result

    def close(self) -> None:
        """Removes the devices' state directories."""
        self._pool.get([worker.close.remote(self._key) for worker in self._pool.workers])
