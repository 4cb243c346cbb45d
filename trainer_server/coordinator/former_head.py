"""Whether the head that was computed from sums stays (ours).

No robust rule applies to sums: wrong ones of a single device can make the head useless. So the devices compare it with
the head of stage 1, on their held-out samples. The median over devices decides, which a minority cannot move far.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.messages import Update

MAX_LOSS = 0.05  # of the median held-out accuracy
CHANCE = 0.25  # CHANCE/√n more with n held-out samples; both heads see the same samples, so chance moves little
METRIC = "held_out_global"


@dataclass(frozen=True)
class FormerHead:
    """The head of stage 1, flat, once another one replaces it, and by device its held-out accuracy."""

    head: Vector = field(default_factory=lambda: np.empty(0, np.float32))
    accuracies: Mapping[str, float] = field(default_factory=dict)


def reported(updates: Mapping[str, Update]) -> dict[str, float]:
    """By device, the held-out accuracy of the global expert in its update, if there is one."""
    return {device: update.metrics[METRIC] for device, update in updates.items() if METRIC in update.metrics}


def median_loss(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """By how much the accuracy of a device has fallen: the median over the devices that are in both, 0 without any."""
    losses = [before[device] - after[device] for device in sorted(before.keys() & after.keys())]
    return statistics.median(losses) if losses else 0.0


def why_rejected(former: FormerHead, updates: Mapping[str, Update]) -> str:
    """Why the former head has to come back, by the updates of the first round of stage 2, or ""."""
    if not former.head.size:
        return ""
    loss = median_loss(former.accuracies, reported(updates))
    samples = statistics.median(update.samples for update in updates.values())  # held-out ones, in stage 2
    if loss <= MAX_LOSS + CHANCE / max(samples, 1) ** 0.5:
        return ""
    return f"with the head of the sums the median held-out accuracy of the global expert is {loss:.2f} lower"
