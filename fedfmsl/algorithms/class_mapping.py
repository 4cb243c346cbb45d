"""The head of an expert for another list of classes (ours).

Only the head has values per class: a row of F weights and a bias. LoRA and gate adapter know no classes, and a device
makes its class prior from its own samples. So a run goes on with other classes if the rows of its head are moved:

    head = mapped_head(head, class_indices(("apple", "kiwi"), ("kiwi", "plum")), fresh)

Classes are the same if their names are. Rows of removed classes leave.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedfmsl.algorithms.arrays import Bools, Doubles, Labels, Vector

NEW = -1  # index of a class that the earlier list does not have


def class_indices(before: Sequence[str], after: Sequence[str]) -> Labels:
    """For each class of the list `after` (C,), its index in the list `before`, or NEW."""
    known = {name: index for index, name in enumerate(before)}
    return np.array([known.get(name, NEW) for name in after], np.int64)


def mapped_head(head: Vector, indices: Labels, fresh: Vector) -> Vector:
    """The flat head (C(F+1),) of the list with these `indices` (C,), from the flat `head` of the earlier list.

    Kept rows are copied. New rows are those of `fresh`, a flat head of the new list, such as that of class means. They
    stand to the kept rows as they do in `fresh`, and are scaled as the kept rows are: a softmax sees only differences
    of rows. A new class without a row in `fresh` (zeros) starts at the mean of the kept rows. Without kept classes the
    result is `fresh`.

    Raises ValueError unless both heads have rows of the same width.
    """
    new = _rows(fresh, len(indices))
    width = new.shape[1]
    if head.size % width:
        raise ValueError(f"a head of {head.size} values does not have rows of {width}")
    old, kept = _rows(head, head.size // width), np.asarray(indices != NEW, np.bool_)
    rows = new.copy()
    if kept.any():
        rows[kept] = old[indices[kept]]
        rows[~kept] = _placed(rows[kept].astype(np.float64), new.astype(np.float64), kept)
    return np.concatenate([rows[:, :-1].ravel(), rows[:, -1]])


def _placed(copied: Doubles, fresh: Doubles, kept: Bools) -> Doubles:
    """Rows for the new classes, from rows of `fresh` (C, F+1), in the frame of the `copied` rows."""
    has_row = np.asarray(fresh[:, :-1].any(axis=1), np.bool_)
    common = has_row[kept]  # of the kept classes
    known = fresh[kept][common]
    start = copied.mean(axis=0)
    if not common.any():
        return np.asarray(start + fresh[~kept], np.float64)
    centre, target = known.mean(axis=0), copied[common].mean(axis=0)
    spread = np.linalg.norm(known - centre)
    scale = np.linalg.norm(copied[common] - target) / spread if spread else 1.0
    placed = target + scale * (fresh[~kept] - centre)
    return np.asarray(np.where(has_row[~kept][:, None], placed, start), np.float64)


def _rows(head: Vector, classes: int) -> Vector:
    """Weights and bias of each class (C, F+1) of a flat head."""
    weight, bias = head[: head.size - classes].reshape(classes, -1), head[head.size - classes :]
    return np.concatenate([weight, bias[:, None]], axis=1)
