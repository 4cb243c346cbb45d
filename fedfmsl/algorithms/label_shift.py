"""Adapts a device's class prior to its unlabelled samples: EM for label shift (Saerens et al. 2002), with a prior.

Devices see few samples, and a novel class gets mass from every misclassified one. So the rate of novel classes and
the classes within the held and the novel group have Dirichlet priors of different strength (ours).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import MIN_PROBABILITY, Floats

RATE_STRENGTH = 10.0  # pseudo-samples of the default rate; ours, chosen on held-out samples
CLASS_STRENGTH = 1000.0  # pseudo-samples of the default classes within each group
MIN_SAMPLES = 10  # with fewer, the default prior stays
ITERATIONS = 20
WINDOW = 1000  # newest samples of a stream that its prior is estimated from


def adapted_prior(log_p: Floats, prior: Floats, held: NDArray[np.bool_]) -> Floats:
    """The class prior (C,) that n unlabelled samples make most likely.

    `log_p` (n, C): class log-probabilities of a model whose class prior is `prior` (C,). `held` (C,): held classes.
    """
    start = np.asarray(prior, np.float64)
    if len(log_p) < MIN_SAMPLES:
        return np.asarray(start, np.float32)
    likelihood = np.exp(np.asarray(log_p, np.float64)) / np.maximum(start, MIN_PROBABILITY)
    adapted = start.copy()
    for _ in range(ITERATIONS):
        posterior = likelihood * adapted
        counts = (posterior / np.maximum(posterior.sum(axis=1, keepdims=True), 1e-300)).sum(axis=0)
        rates = [counts[group].sum() + RATE_STRENGTH * start[group].sum() for group in (held, ~held)]
        for group, rate in zip((held, ~held), rates, strict=True):
            classes = counts[group] + CLASS_STRENGTH * start[group]
            adapted[group] = rate / sum(rates) * classes / max(classes.sum(), MIN_PROBABILITY)
    return np.asarray(adapted, np.float32)


def prior_shift(prior: Floats, adapted: Floats) -> Floats:
    """What the log-probabilities of a model with the class prior `prior` gain under `adapted`, both (C,)."""
    return np.asarray(
        np.log(np.maximum(adapted, MIN_PROBABILITY)) - np.log(np.maximum(prior, MIN_PROBABILITY)), np.float32
    )


def adapt_in_order(log_p: Floats, prior: Floats, held: NDArray[np.bool_]) -> Floats:
    """`log_p` (n, C) of a stream, each sample's under the prior that the WINDOW samples up to it make most likely."""
    ends = range(1, len(log_p) + 1)
    adapted = [adapted_prior(log_p[max(0, end - WINDOW) : end], prior, held) for end in ends]
    shifts = [prior_shift(prior, each) for each in adapted]
    return np.asarray(log_p + np.reshape(shifts, log_p.shape), np.float32)
