"""Probabilities that mean what they say, and the confidence below which an image is called unknown (ours).

Both are taken from the device's held-out slice. That slice has also chosen levels and the best expert and trained the
gate, so the model does a little better on it than on what comes next: temperatures come out a little too low, and a
little more than ALPHA of what comes next is called unknown.
"""

from __future__ import annotations

import math

import numpy as np

from edge_runtime.engine import Floats
from edge_runtime.mixture import Labels, log_softmax, nll

UNKNOWN = "unknown"
ALPHA = 0.05  # of the images of known classes, how many may be called unknown
# Standard deviation of log T: two thirds of all temperatures within a factor of two of 1, nearly all within four, which
# is where those of trained networks lie (Guo et al. 2017). It weighs as much as a few images do: slices of some dozen
# decide for themselves, and one that is all correct, whose likelihood would have T go to 0, stays near 1/2.
PRIOR_WIDTH = math.log(2)
RANGE, PASSES, CANDIDATES = 4 * PRIOR_WIDTH, 3, 21  # each pass looks ten times closer, at last at a thousandth of log T


def calibrated(log_p: Floats, temperature: float) -> Floats:
    """Class log-probabilities (n, C) at a temperature: the order of classes stays, how sure they are does not."""
    return log_softmax(log_p / np.float32(temperature))


def fit_temperature(log_p: Floats, labels: Labels) -> float:
    """The T of softmax(log p / T) (Guo et al. 2017) that labels (n,) make most likely, given a log-normal prior around
    1; `log_p` (n, C). Without images it is 1."""

    def cost(log_t: float) -> float:
        return len(labels) * nll(calibrated(log_p, math.exp(log_t)), labels) + (log_t / PRIOR_WIDTH) ** 2 / 2

    best, width = 0.0, RANGE
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
