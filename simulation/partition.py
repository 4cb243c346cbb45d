"""Divides a data set among devices (ours where no source is named).

Each class is divided by itself, so that training and test samples of a class have the same proportions. A device has
LEAST or more training samples of a class, or none: one to train on, one held out. It has test samples only of classes
that it has training samples of; those of a class without training samples are divided evenly. C classes, K devices, n
samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from devices.trial.shares import LEAST, dirichlet_shares
from fedfmsl.algorithms.arrays import Labels
from fedfmsl.errors import ConfigError

Indices = NDArray[np.int64]
Shares = tuple[Sequence[Sequence[int] | Indices], Sequence[Sequence[int] | Indices]]  # by device: training, test
Divide = Callable[[int, Indices, Indices, np.random.Generator], Shares]  # of one class


class Scheme(str, Enum):
    """How samples are divided. `dirichlet`: each class in Dirichlet(α) proportions (Hsu et al. 2019). `pathological`: a
    few classes per device (McMahan et al. 2017). `quantity`: Dirichlet(α) sizes, the same class frequencies.
    `natural`: by a column or folder of the data."""

    DIRICHLET = "dirichlet"
    PATHOLOGICAL = "pathological"
    QUANTITY = "quantity"
    NATURAL = "natural"
    IID = "iid"


REMEDIES = {  # if a device has too few samples
    Scheme.DIRICHLET: "use a larger --alpha, fewer devices, or --partition pathological",
    Scheme.PATHOLOGICAL: "use fewer devices or more --classes-per-device",
    Scheme.QUANTITY: "use a larger --alpha or fewer devices",
    Scheme.NATURAL: "use fewer devices",
    Scheme.IID: "use fewer devices",
}


@dataclass(frozen=True)
class Partition:
    """Indices of the training and test samples of each device, K arrays each."""

    train: tuple[Indices, ...]
    test: tuple[Indices, ...]

    def counts(self, labels: Labels, classes: int) -> NDArray[np.int64]:
        """Training samples by device and class (K, C). `labels` (n,) of all training samples."""
        return np.array([np.bincount(labels[own], minlength=classes) for own in self.train])


def by_dirichlet(train: Labels, test: Labels, devices: int, alpha: float, seed: int) -> Partition:
    """A smaller α makes the shares of a class less equal. The shares are those of `devices.trial` with this seed."""

    def divide(_: int, own: Indices, tests: Indices, rng: np.random.Generator) -> Shares:
        return dirichlet_shares(own.tolist(), tests.tolist(), devices, alpha, rng)

    return _by_class(train, test, devices, seed, divide)


def by_classes(train: Labels, test: Labels, devices: int, classes_per_device: int, seed: int) -> Partition:
    """Each device has `classes_per_device` classes, and each class about the same number of devices.

    Raises ConfigError if there are fewer classes.
    """
    count = int(train.max()) + 1
    if classes_per_device > count:
        raise ConfigError(
            f"--classes-per-device {classes_per_device} is more than {count}, the classes of the data; lower it"
        )
    rng = np.random.default_rng(seed)
    held, devices_of = np.zeros((count, devices)), np.zeros(count)
    for device in range(devices):  # the classes with the fewest devices so far
        chosen = np.lexsort((rng.permutation(count), devices_of))[:classes_per_device]
        held[chosen, device] = 1
        devices_of[chosen] += 1
    return _by_proportions(train, test, devices, seed, lambda name: held[name])


def by_quantity(train: Labels, test: Labels, devices: int, alpha: float, seed: int) -> Partition:
    """Devices have Dirichlet(α) sizes and about the same class frequencies."""
    sizes = np.random.default_rng(seed).dirichlet(np.full(devices, alpha))
    return _by_proportions(train, test, devices, seed, lambda _: sizes)


def evenly(train: Labels, test: Labels, devices: int, seed: int) -> Partition:
    """IID: about as many samples of each class on each device."""
    return _by_proportions(train, test, devices, seed, lambda _: np.ones(devices))


def by_group(
    train: Labels, test: Labels, train_groups: Sequence[str], test_groups: Sequence[str], devices: int, seed: int
) -> Partition:
    """Each device has samples of one group, like a writer or a shop. With more devices than groups, a group is divided
    evenly among several devices; with fewer, a device has several groups. Test samples follow their group.

    Raises ConfigError if no sample has a group.
    """
    names = sorted(set(train_groups) - {""})
    if not names:
        raise ConfigError("--partition natural needs groups; name their column or folder with --group-column")
    owners: dict[str, list[int]] = {name: [] for name in names}
    for turn in range(max(devices, len(names))):
        owners[names[turn % len(names)]].append(turn % devices)
    parts: list[tuple[list[Indices], list[Indices]]] = [([], []) for _ in range(devices)]
    for number, name in enumerate(names):
        own = np.flatnonzero(np.asarray(train_groups) == name)
        tests = np.flatnonzero(np.asarray(test_groups) == name)
        shared = evenly(train[own], test[tests], len(owners[name]), seed + number)
        for device, trained, tested in zip(owners[name], shared.train, shared.test, strict=True):
            parts[device][0].append(own[trained])
            parts[device][1].append(tests[tested])
    train_parts, test_parts = zip(*parts, strict=True)
    return Partition(*(tuple(np.sort(np.concatenate(one)) for one in each) for each in (train_parts, test_parts)))


def check_minimum(partition: Partition, least: int, scheme: Scheme) -> None:
    """Raises ConfigError if a device has fewer than `least` training samples."""
    small = [index for index, own in enumerate(partition.train) if len(own) < least]
    if small:
        named = ", ".join(f"device-{index}" for index in small[:3]) + (", …" if len(small) > 3 else "")
        raise ConfigError(
            f"{len(small)} of {len(partition.train)} devices ({named}) would have fewer than {least} training samples; "
            f"{REMEDIES[scheme]}"
        )


def apportion(proportions: NDArray[np.float64], total: int, order: Indices) -> Indices:
    """Counts (K,) near `proportions` · total, with the sum `total`, each 0 or at least LEAST.

    The smallest shares become 0 until the others reach LEAST; `order`, a permutation, decides between equal ones. If
    `total` is less than LEAST, one device has all of it.
    """
    ranked = sorted(order.tolist(), key=lambda device: -proportions[device])
    ranked = [device for device in ranked if proportions[device] > 0][: max(1, total // LEAST)]
    counts = np.zeros(len(proportions), np.int64)
    while ranked:
        kept = np.array(ranked)
        edges = np.round(np.cumsum(proportions[kept]) / proportions[kept].sum() * total).astype(np.int64)
        counts[kept] = np.diff(edges, prepend=0)
        if len(ranked) == 1 or counts[kept].min() >= LEAST:
            return counts
        counts[ranked.pop()] = 0
    return counts


def _by_proportions(
    train: Labels, test: Labels, devices: int, seed: int, proportions: Callable[[int], NDArray[np.float64]]
) -> Partition:
    """Divides each class in the proportions (K,) of that class. Of equal shares that are too small for all, those of
    the devices with the fewest samples so far stay."""
    sizes = np.zeros(devices, np.int64)

    def divide(name: int, own: Indices, tests: Indices, rng: np.random.Generator) -> Shares:
        counts = apportion(proportions(name), len(own), np.lexsort((rng.permutation(devices), sizes)))
        np.add(sizes, counts, out=sizes)
        edges = np.cumsum(counts)
        tested = np.round(edges / len(own) * len(tests)).astype(np.int64)
        return np.split(rng.permutation(own), edges[:-1]), np.split(rng.permutation(tests), tested[:-1])

    return _by_class(train, test, devices, seed, divide)


def _by_class(train: Labels, test: Labels, devices: int, seed: int, divide: Divide) -> Partition:
    """Divides each class, with a random stream of its own."""
    parts: tuple[list[list[int]], ...] = tuple([[] for _ in range(devices)] for _ in ("train", "test"))
    for name in np.union1d(train, test):
        own, tests = np.flatnonzero(train == name), np.flatnonzero(test == name)
        rng = np.random.default_rng([seed, name])
        divided: Shares = divide(int(name), own, tests, rng) if len(own) else ([], np.array_split(tests, devices))
        for split, shares in zip(parts, divided, strict=True):
            for device, share in enumerate(shares):
                split[device].extend(share)
    return Partition(*(tuple(np.array(sorted(own), np.int64) for own in split) for split in parts))
