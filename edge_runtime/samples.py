"""A folder of labelled samples, images or texts → the slices a device trains, holds out and tests on.

Two forms are understood: `DIR/<class>/…`, split here, and `DIR/train/<class>/…` with `DIR/test/<class>/…`, where the
user has split off a test slice. Slices follow the files' content, not their names or dates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.inputs import Kind
from protocol.errors import InputError

HELD_OUT_SHARE = 0.2
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Sample:
    path: Path
    sha256: str
    label: int


@dataclass(frozen=True)
class Slices:
    """A device's samples. `held_out` chooses levels and the best expert and trains the gate; `test` only measures."""

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    test: tuple[Sample, ...]
    unreadable: tuple[Path, ...]

    def class_counts(self, classes: int) -> NDArray[np.int64]:
        """Samples per class (C,), the test slice left out."""
        return np.bincount(labels_of(self.train + self.held_out), minlength=classes)


def labels_of(samples: Sequence[Sample]) -> NDArray[np.int64]:
    return np.array([sample.label for sample in samples], np.int64)


def hold_out_look_alikes(slices: Slices, features: NDArray[np.float32]) -> Slices:
    """Deals training and held-out samples anew: what is held out of each class are samples that look alike (ours).

    A camera takes many pictures of one scene. Held out at random, each has a twin that was trained on, and looks easier
    than what the camera will see next. `features` (n, D) are of `slices.train + slices.held_out`; each class gives the
    sample with the least hash and those most similar to it, as many as were held out before.
    """
    samples = slices.train + slices.held_out
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    chosen: set[int] = set()
    for label, count in enumerate(np.bincount(labels_of(slices.held_out))):
        members = [i for i, sample in enumerate(samples) if sample.label == label]
        members.sort(key=lambda i: samples[i].sha256)
        if members:
            similarity = directions[members] @ directions[members[0]]
            chosen.update(members[i] for i in np.argsort(-similarity, kind="stable")[:count])
    return replace(
        slices,
        train=tuple(sample for i, sample in enumerate(samples) if i not in chosen),
        held_out=tuple(sample for i, sample in enumerate(samples) if i in chosen),
    )


def scan(folder: Path, classes: Sequence[str], kind: Kind) -> Slices:
    """Every readable sample of a kind below `folder`, in slices.

    Raises InputError if there are none, if a class folder has an unknown name, or if a class that is trained on has
    fewer than two (one to train on, one to hold out).
    """
    if not folder.is_dir():
        raise InputError(f"{kind.noun} folder {folder} does not exist")
    unreadable: list[Path] = []
    presplit = (folder / "train").is_dir() and (folder / "test").is_dir()
    by_class = _by_class(folder / "train" if presplit else folder, classes, kind, unreadable)
    if not by_class:
        raise InputError(f"{kind.noun} folder {folder} holds no {kind.noun}s; put them into one subfolder per class")
    known = {sample.sha256 for sample in _flat(by_class)}
    tests = _flat(_by_class(folder / "test", classes, kind, unreadable)) if presplit else []
    test = [sample for sample in tests if sample.sha256 not in known]  # one cannot test what it has trained
    train: list[Sample] = []
    held_out: list[Sample] = []
    for label, samples in by_class.items():
        if len(samples) < 2:
            raise InputError(
                f"class {classes[label]!r} in {folder} has one readable {kind.noun}; it needs at least two "
                f"(one to train on, one to hold out): add {kind.noun}s or remove the folder"
            )
        tested = 0 if presplit else min(round(TEST_SHARE * len(samples)), len(samples) - 2)
        held = tested + max(1, round(HELD_OUT_SHARE * (len(samples) - tested)))
        test += samples[:tested]
        held_out += samples[tested:held]
        train += samples[held:]
    return Slices(tuple(train), tuple(held_out), tuple(test), tuple(unreadable))


def _by_class(folder: Path, classes: Sequence[str], kind: Kind, unreadable: list[Path]) -> dict[int, list[Sample]]:
    """Readable samples per class, ordered by content hash; one that stands twice counts once."""
    found: dict[int, list[Sample]] = {}
    for subfolder in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        paths = kind.files(subfolder)
        if not paths:
            continue
        if subfolder.name not in classes:
            raise InputError(
                f"{subfolder} is not a class of this bundle, which knows {', '.join(classes[:8])}"
                f"{', …' if len(classes) > 8 else ''}; rename or remove the folder"
            )
        label = list(classes).index(subfolder.name)
        samples = {}
        for path in paths:
            data = path.read_bytes()
            if kind.is_readable(path):
                sha256 = hashlib.sha256(data).hexdigest()
                samples[sha256] = Sample(path, sha256, label)
            else:
                unreadable.append(path)
        if samples:
            found[label] = [samples[key] for key in sorted(samples)]
    return found


def _flat(by_class: dict[int, list[Sample]]) -> list[Sample]:
    return [sample for samples in by_class.values() for sample in samples]
