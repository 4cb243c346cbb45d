"""Calibrated probabilities, and the confidence below which a sample is called unknown (ours).

Both are computed from the device's held-out split. That split has also chosen levels and the best expert and trained
the gate, and its samples are from the same places and days as the training samples. A model therefore does better on it
than on later samples: without the prior below, probabilities would be too high. Even with it, more than ALPHA of later
samples are called unknown; `docs/benchmarks.md` says how many.
"""

from __future__ import annotations

import math

import numpy as np

from fedfmsl.algorithms.arrays import Floats, Labels
from fedfmsl.algorithms.mixture import log_softmax, nll

ALPHA = 0.05  # share of samples of known classes that may be called unknown
# Log-normal prior of T: its median, and the standard deviation of log T. Networks are usually too confident (Guo et al.
# 2017): six devices' models needed T of 1.2 to 1.7 on photos of other days (benchmark, seed 0). Their held-out splits
# of 14 to 31 photos, under a weak prior, gave 0.7 to 1.5, the lowest where no photo was misclassified. This prior
# weighs as much as about a hundred photos.
PRIOR_MEDIAN, PRIOR_WIDTH = 1.5, 0.25
RANGE, PASSES, CANDIDATES = 2.5, 3, 21  # search of log T; each pass has a tenth of the range of the pass before


def calibrate(log_p: Floats, temperature: float) -> Floats:
    """Class log-probabilities (n, C) at a temperature. The order of classes does not change."""
    return log_softmax(log_p / np.float32(temperature))


def fit_temperature(log_p: Floats, labels: Labels) -> float:
    """The most likely T of softmax(log p / T) (Guo et al. 2017) for log p (n, C), labels (n,) and the prior (ours).

    Without samples (n = 0) it is the median of the prior, PRIOR_MEDIAN.
    """

    def cost(log_t: float) -> float:
        return len(labels) * nll(calibrate(log_p, math.exp(log_t)), labels) + ((log_t - median) / PRIOR_WIDTH) ** 2 / 2

    median = math.log(PRIOR_MEDIAN)
    best, width = median, RANGE
    for _ in range(PASSES):
        best = min(np.linspace(best - width, best + width, CANDIDATES).tolist(), key=cost)
        width /= (CANDIDATES - 1) / 2
    return math.exp(best)


def calibrated_nll(log_p: Floats, labels: Labels) -> float:
    """The mean negative log-likelihood at the fitted temperature: how good the order of the classes and their relative
    probabilities are, whatever the scale of the logits."""
    return nll(calibrate(log_p, fit_temperature(log_p, labels)), labels)


def unknown_threshold(confidences: Floats) -> float:
    """The confidence threshold, from the confidences (n,) of held-out samples: the ⌊ALPHA (n + 1)⌋-th smallest.

    A sample that is exchangeable with the held-out ones is below it with a probability of at most ALPHA, whatever its
    class (split conformal prediction). There is no guarantee for samples of no class. With fewer than 1/ALPHA - 1
    samples the threshold is 0, and nothing is unknown.
    """
    rank = math.floor(ALPHA * (len(confidences) + 1) + 1e-9)  # so that 0.05 · 20 is 1 in floats, too
    return float(np.sort(confidences)[rank - 1]) if rank else 0.0
