"""The devices' shares of one folder of samples: a folder for each device, with unequal shares of every class."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedfmsl.common.files import MAX_NAME_BYTES
from fedfmsl.errors import ConfigError, InputError

LEAST = 2  # training samples of a class on a device that has the class: one to train on, one held out

Shares = list[list[int]]  # indices of each device's samples


def dirichlet_shares(
    train: Sequence[int], test: Sequence[int], devices: int, alpha: float, rng: np.random.Generator
) -> tuple[Shares, Shares]:
    """Divides one class's samples (indices `train` and `test`) among devices, in the same Dirichlet(α) proportions.

    A device has LEAST or more training samples of the class, or none; test samples only with training samples.
    """
    proportions = rng.dirichlet(np.full(devices, alpha))
    counts = _round(proportions, len(train))
    largest = int(counts.argmax())
    for device in range(devices):
        if 0 < counts[device] < LEAST and device != largest:
            counts[largest] += counts[device]
            counts[device] = 0
    held = np.where(counts > 0, proportions, 0.0)
    return _divide(rng.permutation(train), counts), _divide(rng.permutation(test), _round(held / held.sum(), len(test)))


def write_device_folders(
    train: Mapping[str, Sequence[Path]],
    test: Mapping[str, Sequence[Path]],
    folder: Path,
    devices: int,
    alpha: float,
    seed: int,
) -> list[Path]:
    """Copies the files of each class into `folder`/device-N/{train,test}/<class>/ and returns the devices' folders.

    Raises ConfigError if a device would have no samples, InputError if a class has fewer than LEAST.
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
            raise InputError(f"class {name!r} has {len(trained)} file(s); at least {LEAST} are needed")
        tested = test.get(name, ())
        shares = dirichlet_shares(range(len(trained)), range(len(tested)), devices, alpha, rng)
        for split, paths, share in (("train", trained, shares[0]), ("test", tested, shares[1])):
            for root, indices in zip(roots, share, strict=True):
                for index in indices:
                    target = root / split / name / _target_name(index, paths[index].name)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(paths[index], target)
    empty = [root.name for root in roots if not any((root / "train").iterdir())]
    if empty:
        raise ConfigError(
            f"{len(empty)} of {devices} devices would have no samples with --alpha {alpha:g} and --seed {seed}; use a "
            "larger --alpha, fewer --devices or another --seed"
        )
    return roots


def _target_name(index: int, name: str) -> str:
    """The name of a copy. Subfolders may repeat names, so it begins with the number; the end of a long name is kept."""
    prefix = f"{index:04}-"
    return prefix + os.fsencode(name)[-(MAX_NAME_BYTES - len(prefix)) :].decode(errors="ignore")


def _round(proportions: np.ndarray, total: int) -> np.ndarray:
    """Integer counts near proportions · total, with the sum total."""
    edges = np.round(np.cumsum(proportions) * total).astype(int)
    edges[-1] = total
    return np.diff(edges, prepend=0)


def _divide(order: np.ndarray, counts: np.ndarray) -> Shares:
    return [part.tolist() for part in np.split(order, np.cumsum(counts)[:-1])]
