"""Whether the head that was computed from sums stays (ours).

No robust rule applies to sums: wrong ones of a single device can make the head useless. So the devices compare it with
the head of stage 1, on their held-out samples and among all classes, also those that they do not hold. Likelihoods say
more of few samples than accuracies. The median over devices decides, which a minority cannot move far.

The head of stage 1 was trained to be replaced. So when it comes back, the last rounds of stage 1 are repeated as in a
run without sums.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.messages import Update

MAX_LOSS = 0.05  # nats; without hostile devices the likelihood rose by 0.1 to 0.4 (groceries, 6 and 18 rounds)
RETRAINED = 6  # rounds of stage 1 at most; chosen on held-out samples (groceries, 6 rounds)
METRIC = "global_nll"


@dataclass(frozen=True)
class FormerHead:
    """The head of stage 1, flat, once another one replaces it, and by device the negative log-likelihood of its
    held-out samples. `made`: the closed round that made it. `rejected`: whether the other one was rejected; then no
    sums replace the head any more."""

    head: Vector = field(default_factory=lambda: np.empty(0, np.float32))
    nlls: Mapping[str, float] = field(default_factory=dict)
    made: int = 0
    rejected: bool = False


def reported(updates: Mapping[str, Update]) -> dict[str, float]:
    """By device, the negative log-likelihood under the global expert in its update, if there is one."""
    return {device: update.metrics[METRIC] for device, update in updates.items() if METRIC in update.metrics}


def median_loss(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """By how much a device's likelihood has fallen: the median over the devices that are in both, 0 without any."""
    losses = [after[device] - before[device] for device in sorted(before.keys() & after.keys())]
    return statistics.median(losses) if losses else 0.0


def why_rejected(former: FormerHead, updates: Mapping[str, Update]) -> str:
    """Why the former head has to come back, by the updates of the first round of stage 2, or ""."""
    loss = median_loss(former.nlls, reported(updates))
    if not former.head.size or loss <= MAX_LOSS:
        return ""
    return f"with the head of the sums the median log-likelihood of held-out samples is {loss:.2f} nats lower"
