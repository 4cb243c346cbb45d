"""Which files to ask about first: least certain first, near-duplicates together, different scenes after each other.

The margin is that of Scheffer et al. 2001; the greedy k-centre is that of Sener & Savarese 2018, here among the least
certain files only. The grouping of near-duplicates is ours: they get one answer, so a group has to be small enough to
be seen at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Floats

SAME = 0.9  # cosine of two features from which their files are near-duplicates
GROUP = 12  # files of one question
POOL = 8  # candidates per question: the k-centre chooses among so many least certain groups
ROWS = 512  # files whose features are compared at once

Features = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Question:
    """Files that get one answer. `members` are row numbers, the least certain one first."""

    members: tuple[int, ...]

    @property
    def first(self) -> int:
        return self.members[0]


def margins(probabilities: Floats) -> Floats:
    """The probability of the best class minus that of the second, of each row of (n, C). Shape (n,)."""
    highest = np.partition(probabilities, -2, axis=1)[:, -2:]
    return np.asarray(highest[:, 1] - highest[:, 0], np.float32)


def questions(margin: Floats, features: Features, count: int, same: float = SAME) -> list[Question]:
    """The next `count` questions about n files with these margins (n,) and features (n, F) of any float type.

    Takes memory for one copy of the features of the least certain groups, beside ROWS files at a time.
    """
    groups = near_duplicates(np.argsort(margin, kind="stable"), features, POOL * count, same)
    first = _directions(features[[group.first for group in groups]]) if groups else np.empty((0, 0), np.float32)
    return [groups[index] for index in spread(first, count)]


def near_duplicates(order: NDArray[np.intp], features: Features, limit: int, same: float = SAME) -> list[Question]:
    """The first `limit` groups of near-duplicates. Files are taken in `order`: each joins the first group whose first
    file has at least the cosine `same` with it and which has space, or begins a group."""
    leaders = np.empty((limit, features.shape[1]), np.float32)
    groups: list[list[int]] = []
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        chunk = _directions(features[rows])
        before = len(groups)
        similar = chunk @ leaders[:before].T  # to the groups that were there before this chunk
        for index, row in enumerate(rows):
            within = leaders[before : len(groups)] @ chunk[index]
            cosines = np.concatenate([similar[index], within])
            near = next((int(g) for g in np.flatnonzero(cosines >= same) if len(groups[g]) < GROUP), None)
            if near is not None:
                groups[near].append(int(row))
            elif len(groups) < limit and not (cosines >= same).any():
                leaders[len(groups)] = chunk[index]
                groups.append([int(row)])
    return [Question(tuple(group)) for group in groups]


def spread(directions: Floats, count: int) -> list[int]:
    """`count` of n unit vectors (n, F): the first, and then always the one farthest from all chosen ones."""
    if not len(directions):
        return []
    chosen = [0]
    nearest = directions @ directions[0]
    while len(chosen) < min(count, len(directions)):
        nearest[chosen] = np.inf
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, directions @ directions[chosen[-1]])
    return chosen


def _directions(features: Features | Sequence[Features]) -> Floats:
    rows = np.asarray(features, np.float32)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)
