"""Which files to ask about first: least certain first, near-duplicates together, one scene once.

The margin is that of Scheffer et al. 2001; the rest is ours. Near-duplicates get one answer, so a group has to be small
enough to be seen at once. A greedy k-centre (Sener & Savarese 2018) among the least certain files is no better
(benchmarks/labelling.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import Floats

SAME = 0.975  # cosine of two features from which their files are near-duplicates; 1% of such pairs are of two classes
SCENE = 0.95  # cosine from which two questions are about one scene
GROUP = 12  # files of one question
POOL = 4  # groups per question that are compared
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


def questions(margin: Floats, features: Features, count: int) -> list[Question]:
    """The next `count` questions about n files with these margins (n,) and features (n, F) of any float type.

    A question about the scene of an earlier one comes after all others. Takes memory for the features of POOL groups
    per question, beside ROWS files at a time.
    """
    groups = near_duplicates(np.argsort(margin, kind="stable"), features, POOL * count)
    if not groups:
        return []
    first = _directions(features[[group.first for group in groups]])
    cosines = first @ first.T
    chosen: list[int] = []
    for index in range(len(groups)):
        if not (cosines[index, chosen] >= SCENE).any():
            chosen.append(index)
    rest = [index for index in range(len(groups)) if index not in chosen]
    return [groups[index] for index in (chosen + rest)[:count]]


def near_duplicates(order: NDArray[np.intp], features: Features, limit: int) -> list[Question]:
    """The first `limit` groups of near-duplicates. Files are taken in `order`: each joins the first group whose first
    file has at least the cosine SAME with it and which has space. A file without such a group begins one."""
    leaders = np.empty((limit, features.shape[1]), np.float32)
    groups: list[list[int]] = []
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        chunk = _directions(features[rows])
        before = len(groups)
        similar = chunk @ leaders[:before].T  # to the groups that were there before this chunk
        for index, row in enumerate(rows):
            within = leaders[before : len(groups)] @ chunk[index]
            same = np.flatnonzero(np.concatenate([similar[index], within]) >= SAME)
            near = next((int(group) for group in same if len(groups[group]) < GROUP), None)
            if near is not None:
                groups[near].append(int(row))
            elif len(groups) < limit and not len(same):
                leaders[len(groups)] = chunk[index]
                groups.append([int(row)])
    return [Question(tuple(group)) for group in groups]


def _directions(features: Features) -> Floats:
    rows = np.asarray(features, np.float32)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)
