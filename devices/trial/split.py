"""One folder of labelled samples → one folder for each device of a fleet, with unequal shares of every class."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedfmsl.errors import ConfigError, InputError

LEAST = 2  # samples of a class that a device needs if it has any: one to train on, one to hold out

Shares = list[list[int]]  # for each device, indices of its samples


def dirichlet_shares(
    train: Sequence[int], test: Sequence[int], devices: int, alpha: float, rng: np.random.Generator
) -> tuple[Shares, Shares]:
    """One class's samples (`train` and `test` indices) among devices, by the same Dirichlet(α) proportions.

    A device gets at least LEAST training samples of the class or none, and test samples only if it trains on the class.
    """
    proportions = rng.dirichlet(np.full(devices, alpha))
    counts = _round(proportions, len(train))
    largest = int(counts.argmax())
    for device in range(devices):
        if 0 < counts[device] < LEAST and device != largest:
            counts[largest] += counts[device]
            counts[device] = 0
    held = np.where(counts > 0, proportions, 0.0)
    return _deal(rng.permutation(train), counts), _deal(rng.permutation(test), _round(held / held.sum(), len(test)))


def write_fleet(
    train: Mapping[str, Sequence[Path]],
    test: Mapping[str, Sequence[Path]],
    folder: Path,
    devices: int,
    alpha: float,
    seed: int,
) -> list[Path]:
    """Copies the files of each class into `folder`/device-N/{train,test}/<class>/ and returns the devices' folders.

    Raises ConfigError if a device would be left without any, InputError if a class has fewer than two.
    """
    if folder.exists():
        shutil.rmtree(folder)
    roots = [folder / f"device-{index}" for index in range(devices)]
    for root in roots:
        (root / "train").mkdir(parents=True)
        (root / "test").mkdir()
    for position, (name, trained) in enumerate(sorted(train.items())):
        rng = np.random.default_rng([seed, position])
        if len(trained) < LEAST:
            raise InputError(f"class {name!r} has {len(trained)} file(s), at least {LEAST} are needed")
        tested = test.get(name, ())
        shares = dirichlet_shares(range(len(trained)), range(len(tested)), devices, alpha, rng)
        for kind, paths, share in (("train", trained, shares[0]), ("test", tested, shares[1])):
            for root, indices in zip(roots, share, strict=True):
                for index in indices:
                    target = root / kind / name / f"{index:04}-{paths[index].name}"  # names may recur in subfolders
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(paths[index], target)
    empty = [root.name for root in roots if not any((root / "train").iterdir())]
    if empty:
        raise ConfigError(
            f"{', '.join(empty)} would get nothing with alpha {alpha}, seed {seed} and {devices} devices; "
            "use a larger alpha, fewer devices or another seed"
        )
    return roots


def _round(proportions: np.ndarray, total: int) -> np.ndarray:
    """Whole counts near proportions · total that add up to total."""
    edges = np.round(np.cumsum(proportions) * total).astype(int)
    edges[-1] = total
    return np.diff(edges, prepend=0)


def _deal(order: np.ndarray, counts: np.ndarray) -> Shares:
    return [part.tolist() for part in np.split(order, np.cumsum(counts)[:-1])]
