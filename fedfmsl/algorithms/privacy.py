"""Client-level differential privacy, noised on the devices (DP-FedAvg, McMahan et al., ICLR 2018; shared noise ours).

Protected is a device's whole set of samples, against everybody who sees aggregates: the globals of every round, which
are public to the fleet. Each device adds its share of the noise, so that a sum of at least `shares` updates holds noise
of `noise_multiplier` times what any one device can change; `fedfmsl.algorithms.accounting` says what ε that is. The server
itself sees single updates with 1/√shares of that noise: towards it the promise is weaker.

Not protected are the accuracies of an evaluation (metrics and counts per class) and the numbers of samples in a
device's status. All else that an update says beside its tensors is constant under privacy, or does not depend on what
the samples show.
"""

from __future__ import annotations

import numpy as np

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.messages import Privacy
from fedfmsl.protocol.tensors import Tensors

LARGEST_NORM = 4.0  # of a mean feature norm, over √F; a normalised feature's is about one (ours)


def privatize(delta: Vector, privacy: Privacy, rng: np.random.Generator) -> Vector:
    """`delta` (P,) scaled down to an L2 norm of `clip`, with this device's share of the noise."""
    values = np.asarray(delta, np.float64)
    norm = float(np.linalg.norm(values))
    clipped = values * min(1.0, privacy.clip / max(norm, 1e-12))
    deviation = privacy.noise_multiplier * privacy.clip / np.sqrt(privacy.shares)
    return np.asarray(clipped + rng.normal(0.0, deviation, values.shape), np.float32)


def privatize_statistics(sums: Tensors, privacy: Privacy, rng: np.random.Generator) -> Tensors:
    """Class sums (C, F), counts (C,) and the norms' sum (1,) of a device as one vector of L2 norm 1 at most, noised.

    u = (class sums / norm sum, r / R) / √2, with r the mean feature norm, cut to R. The class sums' norm is at most the
    sum of norms, so each half has at most norm 1. What is sent makes `head_of_class_means` find the directions and the
    mean norm in a sum over devices, each with one voice: counts add up to one per device. Nothing is cut after the
    noise: a cut per device is not a function of the sum, for which alone ε is known.
    """
    class_sums, counts = (np.asarray(sums[name], np.float64) for name in ("class_sums", "class_counts"))
    norm_sum = float(np.asarray(sums["norm_sum"], np.float64).sum())
    classes, feature = class_sums.shape
    largest = LARGEST_NORM * np.sqrt(feature)
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
