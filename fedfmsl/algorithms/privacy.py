"""Client-level differential privacy with noise added on the devices (DP-FedAvg, McMahan et al., ICLR 2018; splitting
the noise over the devices is ours).

It protects a device's whole set of samples against everyone who sees aggregates: the globals of every round are public
to all devices. Each device adds its share of the noise. A sum of at least `shares` updates then holds noise of
`noise_multiplier` times the largest change that one device can cause; `fedfmsl.algorithms.accounting` computes its ε.
The server itself sees single updates, with 1/√shares of that noise: against the server the protection is weaker.

Not protected: the accuracies of an evaluation (metrics and counts per class) and the numbers of samples in a device's
status. Every other field of an update is constant under privacy or does not depend on the content of the samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedfmsl.algorithms.arrays import Tensors, Vector
from fedfmsl.algorithms.checks import check_range

MAX_NORM = 4.0  # cap of a mean feature norm, over √F; a normalized feature has about 1 (ours)


@dataclass(frozen=True)
class Privacy:
    """An update is clipped to the L2 norm `clip` and gets Gaussian noise of standard deviation
    noise_multiplier · clip / √shares. `shares`: the least number of updates in an aggregate."""

    clip: float
    noise_multiplier: float
    shares: int

    def __post_init__(self) -> None:
        check_range(self, "clip", above=0)
        check_range(self, "noise_multiplier", above=0)
        check_range(self, "shares", at_least=1, at_most=2**31)


def privatize(delta: Vector, privacy: Privacy, rng: np.random.Generator) -> Vector:
    """`delta` (P,) clipped, with this device's share of the noise."""
    values = np.asarray(delta, np.float64)
    norm = float(np.linalg.norm(values))
    clipped = values * min(1.0, privacy.clip / max(norm, 1e-12))
    deviation = privacy.noise_multiplier * privacy.clip / np.sqrt(privacy.shares)
    return np.asarray(clipped + rng.normal(0.0, deviation, values.shape), np.float32)


def privatize_statistics(sums: Tensors, privacy: Privacy, rng: np.random.Generator) -> Tensors:
    """`class_sums` (C, F), `class_counts` (C,) and `norm_sum` (1,) of a device, clipped as one vector and noised.

    The vector u = (class sums / norm sum, r / R) / √2 has an L2 norm of at most 1; r is the mean feature norm, capped
    at R. The norm of the class sums is at most the sum of norms, so each half has at most norm 1. From a sum over
    devices, `class_mean_head` computes the directions and the mean norm; every device has the same weight, because
    its counts add up to one. Nothing is clipped after the noise: ε holds for the sum, and a clip on each device is not
    a function of the sum.
    """
    class_sums, counts = (np.asarray(sums[name], np.float64) for name in ("class_sums", "class_counts"))
    norm_sum = float(np.asarray(sums["norm_sum"], np.float64).sum())
    classes, feature = class_sums.shape
    largest = MAX_NORM * np.sqrt(feature)
    mean_norm = min(norm_sum / max(float(counts.sum()), 1.0), largest)
    directions = class_sums / max(norm_sum, 1e-12)
    unit = Privacy(clip=1.0, noise_multiplier=privacy.noise_multiplier, shares=privacy.shares)
    u = np.append(directions.ravel(), mean_norm / largest) / np.sqrt(2)
    noised = privatize(np.asarray(u, np.float32), unit, rng) * np.float32(np.sqrt(2))
    return {
        "class_sums": noised[:-1].reshape(classes, feature),
        "class_counts": np.full(classes, 1 / classes, np.float32),
        "norm_sum": noised[-1:] * np.float32(largest),
    }
