"""Probabilities that mean what they say, and the confidence below which an image is called unknown (ours).

Both are taken from the device's held-out slice. That slice has also chosen levels and the best expert and trained the
gate, and it was taken in the same places on the same days as what was trained on. So a model does better on it than on
what comes next: its word alone would make probabilities too high, and more than ALPHA of what comes next is called
unknown. `docs/benchmarks.md` says by how much.
"""

from __future__ import annotations

import math

import numpy as np

from fedfmsl.algorithms.arrays import Floats, Labels
from fedfmsl.algorithms.mixture import log_softmax, nll

UNKNOWN = "unknown"
ALPHA = 0.05  # of the images of known classes, how many may be called unknown
# The log-normal prior of T: its median, and the standard deviation of log T. Networks are surer than they are right, as
# a rule (Guo et al. 2017): six devices' models were by a T of 1.2 to 1.7 on photos of other days (benchmark, seed 0),
# while their slices of 14 to 31 photos, under a weak prior, said 0.7 to 1.5, the least where none was misclassified.
# This prior weighs as much as a hundred photos do.
PRIOR_MEDIAN, PRIOR_WIDTH = 1.5, 0.25
RANGE, PASSES, CANDIDATES = 2.5, 3, 21  # of log T; each pass looks ten times closer


def calibrated(log_p: Floats, temperature: float) -> Floats:
    """Class log-probabilities (n, C) at a temperature: the order of classes stays, how sure they are does not."""
    return log_softmax(log_p / np.float32(temperature))


def fit_temperature(log_p: Floats, labels: Labels) -> float:
    """The T of softmax(log p / T) (Guo et al. 2017) that labels (n,) and the prior together make most likely (ours);
    `log_p` (n, C)."""

    def cost(log_t: float) -> float:
        return len(labels) * nll(calibrated(log_p, math.exp(log_t)), labels) + ((log_t - median) / PRIOR_WIDTH) ** 2 / 2

    median = math.log(PRIOR_MEDIAN)
    best, width = median, RANGE
    for _ in range(PASSES):
        best = min(np.linspace(best - width, best + width, CANDIDATES).tolist(), key=cost)
        width /= (CANDIDATES - 1) / 2
    return math.exp(best)


def unknown_below(confidences: Floats) -> float:
    """The threshold of confidence, from those (n,) of held-out images: the ⌊ALPHA (n + 1)⌋-th smallest.

    An image that is exchangeable with these is below it with a probability of at most ALPHA (split conformal
    prediction), whichever its class; of images of no class at all it promises nothing. With fewer than 1/ALPHA - 1
    images there is no such threshold, and nothing is unknown: 0.
    """
    rank = math.floor(ALPHA * (len(confidences) + 1) + 1e-9)  # 0.05 · 20 is 1, whatever floats say
    return float(np.sort(confidences)[rank - 1]) if rank else 0.0
