"""What a run starts with if it goes on from an earlier one (ours): the global expert, the gate adapter and SAL's level.

Local experts stay on their devices. As in every run, they start from the global expert when stage 2 begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedfmsl.algorithms.arrays import Bools, Vector
from fedfmsl.algorithms.class_mapping import NEW, class_indices, mapped_head
from fedfmsl.protocol.task_bundle import TaskBundle


@dataclass(frozen=True)
class WarmStart:
    """`expert` (P,) and `gate` (G,) in the layouts of this run. `level`: SAL's. `kept` (C,): the classes that the
    earlier run has, too."""

    expert: Vector
    gate: Vector
    level: int
    kept: Bools

    def with_new_rows(self, head: Vector, fresh: Vector) -> Vector:
        """The flat `head` with rows of the flat head `fresh` for new classes (see `mapped_head`)."""
        return mapped_head(head, np.where(self.kept, np.arange(self.kept.size), NEW), fresh)


def warm_start(
    bundle: TaskBundle, classes: Sequence[str], expert: Vector, level: int, gate: Vector | None = None
) -> WarmStart:
    """The start of a run of `bundle` from an earlier global expert: a head of these `classes`, then the LoRA of `level`
    blocks, or more. Blocks above `level` start as in every run, and so does the gate adapter if there is none. A new
    class has no row of its own yet."""
    initial, initial_gate = bundle.initial()
    head, indices = bundle.expert.size(0), class_indices(classes, bundle.classes)
    before = len(classes) * (bundle.manifest.dims.feature + 1)  # values of the earlier head
    trained = expert[before:][: bundle.expert.size(level) - head]
    mapped = mapped_head(expert[:before], indices, initial[:head])
    whole = np.concatenate([mapped, trained, initial[head + trained.size :]])
    return WarmStart(whole, initial_gate if gate is None else gate, level, np.asarray(indices != NEW, np.bool_))
