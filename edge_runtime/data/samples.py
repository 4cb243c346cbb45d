"""The samples of a device, and the slices that it trains, holds out and tests on.

Which slice a sample is of follows its content, not its name or date, and is kept (see `edge_runtime.data.ledger`): what was
trained on is never tested on, however files come and go. Samples that nobody has dealt yet are dealt in two steps,
because the second needs their features: `assign_splits`, and `assign_new_samples`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedfmsl.common.class_folders import SkippedFile
from fedfmsl.errors import InputError

HELD_OUT_SHARE = 0.2
TEST_SHARE = 0.2
LEAST = 2  # samples of a class that is trained on: one to train on, one to hold out
LOOK_ALIKE = 0.5  # is nearer than this times what is nearest in the other slice (as Lowe's ratio test has it)
ALONE = "alone in its class, which needs at least two, one to train on and one to hold out; add more, or remove it"


@dataclass(frozen=True, slots=True)
class Sample:
    """A file, by its content. `extent` is what the memory that reading it takes grows with."""

    path: Path
    sha256: str
    label: int
    extent: int = 0


class SampleChangedError(InputError):
    """A sample's file is not what it was when the folder was looked at: it has to be looked at again."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} has changed since the folder was looked at")
        self.path = path


class Split(Enum):
    TRAIN = "train"
    HELD_OUT = "held out"
    TEST = "test"


@dataclass(frozen=True)
class Splits:
    """A device's samples. `held_out` chooses levels and the best expert and trains the gate; `test` only measures.

    `unassigned` are contents (SHA-256) of `train` and `held_out` that their features have still to deal.
    """

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    test: tuple[Sample, ...]
    skipped: tuple[SkippedFile, ...] = ()
    unassigned: frozenset[str] = frozenset()

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.train + self.held_out + self.test

    @property
    def unassigned_samples(self) -> tuple[Sample, ...]:
        """The newcomers, and all that they may look like: what else is trained on or held out of their classes."""
        samples = self.train + self.held_out
        labels = {sample.label for sample in samples if sample.sha256 in self.unassigned}
        return tuple(sample for sample in samples if sample.label in labels)

    def class_counts(self, classes: int) -> NDArray[np.int64]:
        """Samples per class (C,), the test slice left out."""
        return np.bincount(labels_of(self.train + self.held_out), minlength=classes)


def labels_of(samples: Sequence[Sample]) -> NDArray[np.int64]:
    return np.array([sample.label for sample in samples], np.int64)


def assign_splits(samples: Sequence[Sample], apart: Sequence[Sample] | None, kept: Mapping[str, Split]) -> Splits:
    """Samples, each content once, into slices (ours). `apart` is what the user keeps apart to test on; None: a test
    slice is dealt here. `kept` says which slice a content is of since earlier, in the order in which they were dealt.

    A class of which nothing is trained on yet is dealt by its hashes. Later a sample is to test on if its hash says so,
    and else waits for `assign_new_samples`. If only one slice is left of a class, one of it changes over between training
    and held out. A class with fewer than LEAST of both is set aside.
    """
    parts: dict[Split, list[Sample]] = {part: [] for part in Split}
    unassigned: set[str] = set()
    skipped: list[SkippedFile] = []
    if apart is not None:
        samples, parts[Split.TEST], skipped = _keep_apart(samples, apart, kept)
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    for members in by_class.values():
        dealt, free = _assign_class(sorted(members, key=_content), apart is None, kept)
        trained = [sample for sample, part in dealt.items() if part is not Split.TEST]
        if len(trained) < LEAST:
            skipped += [SkippedFile(sample.path, ALONE) for sample in trained]
            dealt, free = {sample: part for sample, part in dealt.items() if part is Split.TEST}, set()
        unassigned |= {sample.sha256 for sample in free}
        for sample, part in dealt.items():
            parts[part].append(sample)
    place = {sha256: index for index, sha256 in enumerate(kept)}
    train, held_out, test = (
        tuple(sorted(parts[part], key=lambda sample: place.get(sample.sha256, len(place))))
        for part in (Split.TRAIN, Split.HELD_OUT, Split.TEST)
    )
    return Splits(train, held_out, test, tuple(skipped), frozenset(unassigned))


def assign_new_samples(slices: Splits, features: NDArray[np.float32]) -> Splits:
    """Deals the newcomers so that training and held-out samples do not look alike (ours).

    A camera takes many pictures of one scene. Held out at random, each has a twin that was trained on, and looks easier
    than what the camera will see next. `features` (n, D) are of `slices.unassigned_samples`. In a class of newcomers only, the
    sample with the least hash and those most similar to it are held out, as many as `assign_splits` has held out. Else each
    joins the slice of its look-alike, or, if it has none, the slice that is short of its share.
    """
    samples = slices.unassigned_samples
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    directions = dict(zip(map(_content, samples), features / np.maximum(norms, 1e-12), strict=True))
    chosen = {sample.sha256 for sample in slices.held_out}
    held_out: set[str] = set()
    by_class: dict[int, list[str]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample.sha256)
    for members in by_class.values():
        members.sort()
        placed = [sha256 for sha256 in members if sha256 not in slices.unassigned]
        new = [sha256 for sha256 in members if sha256 in slices.unassigned]
        rows = np.stack([directions[sha256] for sha256 in placed + new])
        if placed:
            held = _join_look_alikes(rows, np.array([sha256 in chosen for sha256 in placed]))
        else:
            held = _hold_out_look_alikes(rows, sum(sha256 in chosen for sha256 in new))
        held_out |= {sha256 for sha256, is_held in zip(placed + new, held, strict=True) if is_held}
    free = [sample for sample in slices.train + slices.held_out if sample.sha256 in slices.unassigned]

    def settled(part: tuple[Sample, ...]) -> list[Sample]:
        return [sample for sample in part if sample.sha256 not in slices.unassigned]

    return replace(
        slices,
        train=(*settled(slices.train), *(sample for sample in free if sample.sha256 not in held_out)),
        held_out=(*settled(slices.held_out), *(sample for sample in free if sample.sha256 in held_out)),
        unassigned=frozenset(),
    )


def _content(sample: Sample) -> str:
    return sample.sha256


def _keep_apart(
    samples: Sequence[Sample], apart: Sequence[Sample], kept: Mapping[str, Split]
) -> tuple[list[Sample], list[Sample], list[SkippedFile]]:
    """Those to train on, those to test on, and those that were in the other slice, or are in both."""
    present = set(map(_content, samples))
    to_train, to_test, skipped = [], [], []
    for sample in samples:
        if kept.get(sample.sha256) is Split.TEST:
            skipped.append(SkippedFile(sample.path, "was tested on, and cannot be trained on any more"))
        else:
            to_train.append(sample)
    for sample in apart:
        if sample.sha256 in present:
            skipped.append(SkippedFile(sample.path, "also lies among those to train on, and cannot be tested on"))
        elif kept.get(sample.sha256, Split.TEST) is not Split.TEST:
            skipped.append(SkippedFile(sample.path, "was trained on, and cannot be tested on any more"))
        else:
            to_test.append(sample)
    return to_train, to_test, skipped


def _assign_class(
    members: Sequence[Sample], testing: bool, kept: Mapping[str, Split]
) -> tuple[dict[Sample, Split], set[Sample]]:
    """Which slice each sample is of, for the time being, and those of them that are free to change between training
    and held out. `members` are in the order of their hashes."""
    old = {sample: kept[sample.sha256] for sample in members if sample.sha256 in kept}
    new = [sample for sample in members if sample not in old]
    if not {Split.TRAIN, Split.HELD_OUT} & {*old.values()}:
        tested = min(round(TEST_SHARE * len(new)), max(len(new) - LEAST, 0)) if testing else 0
        held = tested + max(1, round(HELD_OUT_SHARE * (len(new) - tested)))
        first = [Split.TEST] * tested + [Split.HELD_OUT] * (held - tested) + [Split.TRAIN] * (len(new) - held)
        return old | dict(zip(new, first, strict=False)), set(new[tested:])
    dealt = old | {sample: Split.TEST if testing and _is_test(sample) else Split.TRAIN for sample in new}
    free = [sample for sample in new if dealt[sample] is Split.TRAIN]
    for wanted, other in ((Split.TRAIN, Split.HELD_OUT), (Split.HELD_OUT, Split.TRAIN)):
        if wanted not in old.values():
            changed = [*free, *(sample for sample in old if old[sample] is other)][0]
            dealt[changed] = wanted
            free = [sample for sample in free if sample is not changed]
    return dealt, set(free)


def _is_test(sample: Sample) -> bool:
    return int(sample.sha256[:8], 16) < TEST_SHARE * 2**32


def _hold_out_look_alikes(rows: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Which of a class's directions (n, D) are held out: the first, and those most similar to it."""
    held = np.zeros(len(rows), bool)
    held[np.argsort(-(rows @ rows[0]), kind="stable")[:count]] = True
    return held


def _join_look_alikes(rows: NDArray[np.float32], placed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of a class's directions (n, D) are held out, given which of the first of them are: of both some."""
    held = np.zeros(len(rows), bool)
    held[: len(placed)] = placed
    for index in range(len(placed), len(rows)):
        distance = np.maximum(1 - rows[:index] @ rows[index], 0)
        trained, to_held = distance[~held[:index]].min(), distance[held[:index]].min()
        if min(trained, to_held) < LOOK_ALIKE * max(trained, to_held):
            held[index] = to_held < trained
        else:
            held[index] = held.sum() < round(HELD_OUT_SHARE * (index + 1))
    return held
