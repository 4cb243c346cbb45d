"""Whether a new global expert is adopted (ours).

The global expert that a round makes is a candidate. Devices measure it with the next round that trains it or mixes it,
before they train: the likelihood of their held-out samples comes with their updates, so the check costs no round. If
too many devices lose too much against the last good global expert, the candidate is rejected. The updates that were
trained from it are dropped, and the round begins again with the last good one.

With `--canary` a few devices measure the candidate of stage 1 before all others receive it, in a round of its own.

Likelihoods say more of few samples than accuracies, and at the best temperature a useless expert loses about as much as
a guess. Each device counts once, so a single false report has the weight of one device: it can neither reject a
candidate nor keep one (`votes_to_reject`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.messages import Update
from trainer_server.config import MIN_REPORTS
from trainer_server.coordinator.former_head import METRIC


@dataclass(frozen=True)
class LastGood:
    """The last global expert (P,) that was not rejected, and the closed round that made it. Empty and 0 before there is
    one. `nlls`: by device, the mean negative log-likelihood of its held-out samples in nats, under the last good one
    that the device has measured."""

    expert: Vector = field(default_factory=lambda: np.empty(0, np.float32))
    round: int = 0
    nlls: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollback:
    """The operator's order to return to the global expert that the closed round has made, in the blob `sha256`."""

    round: int
    sha256: str


def votes_to_reject(reports: int, max_regressed: float) -> int:
    """How many of so many devices have to lose to reject a candidate: more than the share `max_regressed`, at least
    two, and at most all but one. So it takes two false reports to reject a good candidate, or to keep a bad one."""
    return min(max(math.floor(max_regressed * reports) + 1, 2), reports - 1)


def regressed(before: Mapping[str, float], after: Mapping[str, float], max_loss: float) -> list[str]:
    """The devices in both whose negative log-likelihood has risen by more than `max_loss` nats."""
    return [name for name in sorted(before.keys() & after.keys()) if after[name] - before[name] > max_loss]


def why_rejected(before: Mapping[str, float], after: Mapping[str, float], max_loss: float, max_regressed: float) -> str:
    """Why a candidate is rejected, or "". `before` and `after`: by device, the negative log-likelihood under the last
    good global expert and under the candidate. With fewer than MIN_REPORTS devices in both it is kept."""
    reports = len(before.keys() & after.keys())
    lost = len(regressed(before, after, max_loss))
    if max_regressed >= 1 or reports < MIN_REPORTS or lost < votes_to_reject(reports, max_regressed):
        return ""
    return f"{lost} of {reports} devices lose more than {max_loss:g} nats of held-out likelihood"


def likelihoods(updates: Mapping[tuple[int, str], Update], round_: int) -> dict[str, float]:
    """By device, the negative log-likelihood in its update for this round. Infinite if it has none: devices leave out
    what is not finite."""
    return {name: update.metrics.get(METRIC, math.inf) for (of, name), update in updates.items() if of == round_}
