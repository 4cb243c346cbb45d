"""Rehearsal (ours): training goes on with a few deleted samples of each class, so that it does not forget the class.

The files are gone. Their hidden states and features stay in the feature cache, and their classes in the ledger. Only
samples of the training split are rehearsed: held-out ones are measured with states in fp32, which need the file. A
sample without a state at the level of the round is dropped: its file cannot be read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from edge_runtime.data.samples import Sample, Splits

Kept = Iterable[tuple[str, str]]  # SHA-256 and class of samples that were trained on


def with_rehearsal(
    scanned: Splits, kept: Kept, classes: Sequence[str], most: int, folder: Path, is_stored: Callable[[Sample], bool]
) -> Splits:
    """`scanned` with deleted samples in its training split: of each class at most the first `most` ones of `kept`.

    `folder` is where their files would be. `is_stored`: whether the cache has all that the round needs of a sample.
    """
    present = {sample.sha256 for sample in scanned.samples}
    labels, counts = {name: label for label, name in enumerate(classes)}, dict.fromkeys(classes, 0)
    rehearsed = []
    for sha256, name in kept:
        if sha256 in present or counts.get(name, most) >= most:
            continue
        sample = Sample(folder / sha256, sha256, labels[name])
        if is_stored(sample):
            counts[name] += 1
            rehearsed.append(sample)
    return replace(scanned, train=(*scanned.train, *rehearsed)) if rehearsed else scanned
