"""Client-level differential privacy with noise added on the devices (DP-FedAvg, McMahan et al., ICLR 2018; splitting
the noise over the devices is ours).

It protects a device's whole set of samples against everyone who sees aggregates: the globals of every round are public
to all devices. Each device adds its share of the noise. A sum of at least `shares` updates then holds noise of
`noise_multiplier` times the largest change that one device can cause; `fedfmsl.algorithms.accounting` computes ε for
each observer. With secure aggregation the server sees such sums only; without it, it sees single updates, with
1/√shares of the noise.

Not protected: the accuracies of an evaluation (metrics and counts per class) and the numbers of samples in a device's
status. Every other field of an update is constant under privacy or does not depend on the content of the samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from fedfmsl.algorithms.arrays import Doubles, Tensors, Vector
from fedfmsl.algorithms.checks import check_range
from fedfmsl.algorithms.fixed_point import FRACTION_BITS, Words, fixed_point

MAX_NORM = 4.0  # cap of a mean feature norm, over √F; a normalized feature has about 1 (ours)
LEAST_NOISE = 1e-12  # of a multiplier: with less, ε is too large to compute
MIN_STEPS = 100  # of fixed-point numbers in a share of the noise


@dataclass(frozen=True)
class Privacy:
    """An update is clipped to the L2 norm `clip` and gets Gaussian noise of standard deviation
    noise_multiplier · clip / √shares. `shares`: the least number of updates in an aggregate."""

    clip: float
    noise_multiplier: float
    shares: int

    def __post_init__(self) -> None:
        check_range(self, "clip", above=0)
        check_range(self, "noise_multiplier", at_least=LEAST_NOISE)
        check_range(self, "shares", at_least=1, at_most=2**31)

    @property
    def share(self) -> float:
        """Standard deviation of a device's share of the noise, for an update of norm `clip`."""
        return self.noise_multiplier * self.clip / math.sqrt(self.shares)


def clipped(delta: Vector, privacy: Privacy) -> Doubles:
    """`delta` (P,) with an L2 norm of at most `clip`."""
    values = np.asarray(delta, np.float64)
    return values * min(1.0, privacy.clip / max(float(np.linalg.norm(values)), 1e-12))


def privatize(delta: Vector, privacy: Privacy, rng: np.random.Generator) -> Vector:
    """`delta` (P,) clipped, with this device's share of the noise."""
    values = clipped(delta, privacy)
    return np.asarray(values + rng.normal(0.0, privacy.share, values.shape), np.float32)


def bounded_statistics(sums: Tensors, privacy: Privacy) -> dict[str, tuple[Doubles, float]]:
    """`class_sums` (C, F), `class_counts` (C,) and `norm_sum` (1,) of a device, clipped as one vector. With each tensor
    comes the standard deviation of a device's share of its noise.

    The vector u = (class sums / norm sum, r / R) / √2 has an L2 norm of at most 1; r is the mean feature norm, capped
    at R. The norm of the class sums is at most the sum of norms, so each half has at most norm 1. From a sum over
    devices, `class_mean_head` computes the directions and the mean norm; every device has the same weight, because
    its counts add up to one. Nothing is clipped after the noise: ε holds for the sum, and a clip on each device is not
    a function of the sum.
    """
    class_sums, counts = (np.asarray(sums[name], np.float64) for name in ("class_sums", "class_counts"))
    norm_sum = float(np.asarray(sums["norm_sum"], np.float64).sum())
    classes, feature = class_sums.shape
    largest = MAX_NORM * math.sqrt(feature)
    mean_norm = min(norm_sum / max(float(counts.sum()), 1.0), largest)
    directions = class_sums / max(norm_sum, 1e-12)
    norm = math.sqrt((float((directions**2).sum()) + (mean_norm / largest) ** 2) / 2)
    scale, share = min(1.0, 1 / max(norm, 1e-12)), math.sqrt(2) * replace(privacy, clip=1.0).share
    return {
        "class_sums": (directions * scale, share),
        "class_counts": (np.full(classes, 1 / classes), 0.0),
        "norm_sum": (np.full(1, mean_norm * scale), share * largest),
    }


def privatize_statistics(sums: Tensors, privacy: Privacy, rng: np.random.Generator) -> Tensors:
    """`bounded_statistics` with this device's share of the noise."""
    return {
        name: np.asarray(values + rng.normal(0.0, 1.0, values.shape) * deviation, np.float32)
        for name, (values, deviation) in bounded_statistics(sums, privacy).items()
    }


def privatize_words(values: Doubles, deviation: Doubles, rng: np.random.Generator, bits: int = FRACTION_BITS) -> Words:
    """Fixed-point numbers of `values` (P,), already clipped, with noise of standard deviation `deviation` (P,).

    The values are rounded toward zero, so their norm does not grow, and the noise to the nearest step. In a sum, noise
    of MIN_STEPS steps and more per device is that of a discrete Gaussian (Kairouz et al., ICML 2021), up to a term of
    exp(-2π² · MIN_STEPS²): ε of the Gaussian mechanism holds for the sum.

    Raises ValueError if a number is too large, or noise is less than MIN_STEPS.
    """
    step = 2.0**-bits
    least = float(np.min(deviation, where=deviation > 0, initial=math.inf))
    if least < MIN_STEPS * step:
        raise ValueError(f"noise of {least:.2g} is below {MIN_STEPS} steps of fixed-point numbers; raise --dp-noise")
    noise = rng.normal(0.0, 1.0, values.shape) * deviation
    return fixed_point(np.trunc(values / step) * step, bits) + fixed_point(noise, bits)
