"""The samples of a device and their splits: train, held-out and test.

The split of a sample follows its content, not its name or date, and is kept (see `edge_runtime.data.ledger`): a content
that was trained on never becomes a test sample. Unassigned samples get their split in two steps, because the second
needs their features: `assign_splits`, then `assign_new_samples`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedfmsl.common.folder_walk import SkippedFile
from fedfmsl.errors import InputError, shown

HELD_OUT_SHARE = 0.2
TEST_SHARE = 0.2
LEAST = 2  # samples per trained class: one to train on, one held out
# A sample is a near-duplicate of its nearest neighbour if that is closer than this times the nearest one in the other
# split (Lowe's ratio test).
NEAR_DUPLICATE = 0.5
TOO_FEW = "the only sample of its class; add more: a class needs at least two, one to train on and one held out"


@dataclass(frozen=True, slots=True)
class Sample:
    """A file with a class, identified by its content. `sha256` is empty if the file was not read. `extent`: bytes of
    memory that reading it takes (see `edge_runtime.data.inputs.Reader`)."""

    path: Path
    sha256: str
    label: int
    extent: int = 0


class SampleChangedError(InputError):
    """A file changed between the scan of its folder and its use. The folder has to be scanned again."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{shown(path)} has changed since the folder was scanned")
        self.path = path


class Split(Enum):
    TRAIN = "train"
    HELD_OUT = "held out"
    TEST = "test"


@dataclass(frozen=True)
class Splits:
    """A device's samples. `held_out` chooses levels and the best expert and trains the gate; `test` only measures.

    `unassigned` are the SHA-256 of samples in `train` and `held_out` whose split is provisional. `proposed`: new
    classes and the numbers of their files (see `edge_runtime.data.proposals`). `new`: how many of `train` no round of
    stage 1 or 2 has used yet.
    """

    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    test: tuple[Sample, ...]
    skipped: tuple[SkippedFile, ...] = ()
    unassigned: frozenset[str] = frozenset()
    proposed: Mapping[str, int] = field(default_factory=dict)
    new: int = 0

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self.train + self.held_out + self.test

    @property
    def sizes(self) -> dict[str, int]:
        """The number of samples in each split."""
        return {"train": len(self.train), "held_out": len(self.held_out), "test": len(self.test)}

    @property
    def unassigned_samples(self) -> tuple[Sample, ...]:
        """The unassigned samples and their possible near-duplicates: the assigned ones of the same classes."""
        samples = self.train + self.held_out
        labels = {sample.label for sample in samples if sample.sha256 in self.unassigned}
        return tuple(sample for sample in samples if sample.label in labels)

    def class_counts(self, classes: int) -> NDArray[np.int64]:
        """Training and held-out samples per class. Shape (C,)."""
        return np.bincount(labels_of(self.train + self.held_out), minlength=classes)


def labels_of(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """Class indices. Shape (n,)."""
    return np.array([sample.label for sample in samples], np.int64)


def assign_splits(samples: Sequence[Sample], tests: Sequence[Sample] | None, kept: Mapping[str, Split]) -> Splits:
    """Assigns samples, each content once, to splits (ours). `tests` are the samples in the user's own test folder;
    None: a test split is assigned here. `kept` is the split of each content that has one, in the order of assignment.

    A class without a trained sample is split by the order of its hashes. Later a new sample is a test sample if its
    hash is in the lowest TEST_SHARE, and is otherwise unassigned until `assign_new_samples`. If a class has lost its
    train or its held-out split, one sample moves there. A class with fewer than LEAST samples in both is skipped.
    """
    parts: dict[Split, list[Sample]] = {part: [] for part in Split}
    unassigned: set[str] = set()
    skipped: list[SkippedFile] = []
    if tests is not None:
        samples, parts[Split.TEST], skipped = _own_test_split(samples, tests, kept)
    by_class: dict[int, list[Sample]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    for members in by_class.values():
        assigned, free = _assign_class(sorted(members, key=_content), tests is None, kept)
        trained = [sample for sample, part in assigned.items() if part is not Split.TEST]
        if len(trained) < LEAST:
            skipped += [SkippedFile(sample.path, TOO_FEW) for sample in trained]
            assigned, free = {sample: part for sample, part in assigned.items() if part is Split.TEST}, set()
        unassigned |= {sample.sha256 for sample in free}
        for sample, part in assigned.items():
            parts[part].append(sample)
    place = {sha256: index for index, sha256 in enumerate(kept)}
    train, held_out, test = (
        tuple(sorted(parts[part], key=lambda sample: place.get(sample.sha256, len(place))))
        for part in (Split.TRAIN, Split.HELD_OUT, Split.TEST)
    )
    return Splits(train, held_out, test, tuple(skipped), frozenset(unassigned))


def assign_new_samples(splits: Splits, features: NDArray[np.float32]) -> Splits:
    """Assigns the unassigned samples so that near-duplicates are in the same split (ours). `features` (n, D) are those
    of `splits.unassigned_samples`.

    A camera takes many pictures of one scene. If they were held out at random, each would have a near-duplicate in the
    training split, and held-out accuracy would be too high. If all samples of a class are unassigned, the sample with
    the lowest hash and those most similar to it are held out. Their number is that of `assign_splits`. In another class
    each sample joins its nearest neighbour; without a near-duplicate, it joins the split that has less than its share.
    """
    samples = splits.unassigned_samples
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    directions = dict(zip(map(_content, samples), features / np.maximum(norms, 1e-12), strict=True))
    chosen = {sample.sha256 for sample in splits.held_out}
    held_out: set[str] = set()
    by_class: dict[int, list[str]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample.sha256)
    for members in by_class.values():
        members.sort()
        placed = [sha256 for sha256 in members if sha256 not in splits.unassigned]
        new = [sha256 for sha256 in members if sha256 in splits.unassigned]
        rows = np.stack([directions[sha256] for sha256 in placed + new])
        if placed:
            held = _join_neighbours(rows, np.array([sha256 in chosen for sha256 in placed]))
        else:
            held = _hold_out_neighbours(rows, sum(sha256 in chosen for sha256 in new))
        held_out |= {sha256 for sha256, is_held in zip(placed + new, held, strict=True) if is_held}
    free = [sample for sample in splits.train + splits.held_out if sample.sha256 in splits.unassigned]

    def assigned(part: tuple[Sample, ...]) -> list[Sample]:
        return [sample for sample in part if sample.sha256 not in splits.unassigned]

    return replace(
        splits,
        train=(*assigned(splits.train), *(sample for sample in free if sample.sha256 not in held_out)),
        held_out=(*assigned(splits.held_out), *(sample for sample in free if sample.sha256 in held_out)),
        unassigned=frozenset(),
    )


def are_in(samples: Sequence[Sample], part: Sequence[Sample]) -> NDArray[np.bool_]:
    """Which samples (n,) have a content of `part`."""
    contents = {sample.sha256 for sample in part}
    return np.array([sample.sha256 in contents for sample in samples], bool)


def contents_once(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """The samples, each content once."""
    return tuple({sample.sha256: sample for sample in samples}.values())


def _content(sample: Sample) -> str:
    return sample.sha256


def _own_test_split(
    samples: Sequence[Sample], tests: Sequence[Sample], kept: Mapping[str, Split]
) -> tuple[list[Sample], list[Sample], list[SkippedFile]]:
    """Samples to train on, samples to test on, and skipped ones: in both folders, or in the other split earlier."""
    present = set(map(_content, samples))
    to_train, to_test, skipped = [], [], []
    for sample in samples:
        if kept.get(sample.sha256) is Split.TEST:
            skipped.append(SkippedFile(sample.path, "was a test sample, so it is not trained on"))
        else:
            to_train.append(sample)
    for sample in tests:
        if sample.sha256 in present:
            skipped.append(SkippedFile(sample.path, "is also in the training folder, so it is not tested on"))
        elif kept.get(sample.sha256, Split.TEST) is not Split.TEST:
            skipped.append(SkippedFile(sample.path, "was trained on, so it is not tested on"))
        else:
            to_test.append(sample)
    return to_train, to_test, skipped


def _assign_class(
    members: Sequence[Sample], testing: bool, kept: Mapping[str, Split]
) -> tuple[dict[Sample, Split], set[Sample]]:
    """The split of each sample, and the samples that may still move between train and held-out. `members` are sorted by
    hash."""
    old = {sample: kept[sample.sha256] for sample in members if sample.sha256 in kept}
    new = [sample for sample in members if sample not in old]
    if not {Split.TRAIN, Split.HELD_OUT} & {*old.values()}:
        tested = min(round(TEST_SHARE * len(new)), max(len(new) - LEAST, 0)) if testing else 0
        held = tested + max(1, round(HELD_OUT_SHARE * (len(new) - tested)))
        first = [Split.TEST] * tested + [Split.HELD_OUT] * (held - tested) + [Split.TRAIN] * (len(new) - held)
        return old | dict(zip(new, first, strict=False)), set(new[tested:])
    assigned = old | {sample: Split.TEST if testing and _is_test(sample) else Split.TRAIN for sample in new}
    free = [sample for sample in new if assigned[sample] is Split.TRAIN]
    for missing, other in ((Split.TRAIN, Split.HELD_OUT), (Split.HELD_OUT, Split.TRAIN)):
        if missing not in old.values():
            moved = [*free, *(sample for sample in old if old[sample] is other)][0]
            assigned[moved] = missing
            free = [sample for sample in free if sample is not moved]
    return assigned, set(free)


def _is_test(sample: Sample) -> bool:
    return int(sample.sha256[:8], 16) < TEST_SHARE * 2**32


def _hold_out_neighbours(rows: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Holds out the first of a class's directions (n, D) and its nearest neighbours, `count` in all. Shape (n,)."""
    held = np.zeros(len(rows), bool)
    held[np.argsort(-(rows @ rows[0]), kind="stable")[:count]] = True
    return held


def _join_neighbours(rows: NDArray[np.float32], placed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of a class's directions (n, D) are held out. `placed` (m,) is known for the first m; both values occur."""
    held = np.zeros(len(rows), bool)
    held[: len(placed)] = placed
    for index in range(len(placed), len(rows)):
        distance = np.maximum(1 - rows[:index] @ rows[index], 0)
        trained, to_held = distance[~held[:index]].min(), distance[held[:index]].min()
        if min(trained, to_held) < NEAR_DUPLICATE * max(trained, to_held):
            held[index] = to_held < trained
        else:
            held[index] = held.sum() < round(HELD_OUT_SHARE * (index + 1))
    return held
