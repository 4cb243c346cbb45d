"""MoFM, Mixture of Foundation Models, as functions over arrays.

The paper mixes a global and a local expert with a gate network. The rest is ours. The class prior has a share for novel
classes, which the device does not hold. The local expert knows only held classes. Where the global expert sees a held
class, it gives a share of that probability to the local expert; for a novel class it keeps all of it. So the gate
starts from Bayes' rule, and its network learns how far to deviate from it.

Shapes: class log-probabilities (B, C); log gate weights (B, 2), the global expert first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import MIN_PROBABILITY, NEVER, Floats, Labels

SMOOTHING = 0.1  # samples added to each held class
NOVEL_RATE = 0.2  # prior probability of a novel class; ours, chosen on held-out samples
LOCAL_SHARE = 0.5  # of the global expert's probability of held classes, at the start; ours


@dataclass(frozen=True)
class Biases:
    """What a device adds to the experts' logits. Each has shape (C,).

    `prior`: log class prior. `kept`: log prior times the share that the global expert keeps. `given`: log prior times
    the share that it gives to the local expert. `held`: 0 for held classes, NEVER for the others (FedRS).
    """

    prior: Floats
    kept: Floats
    given: Floats
    held: Floats

    @classmethod
    def of_counts(
        cls, counts: NDArray[np.int64], novel_rate: float = NOVEL_RATE, local_share: float = LOCAL_SHARE
    ) -> Biases:
        """Of a device with `counts` (C,) samples per class."""
        prior, held = class_prior(counts, novel_rate), counts > 0
        given = np.where(held, local_share, 0.0)
        return cls(_log(prior), _log(prior * (1 - given)), _log(prior * given), class_mask(counts))


def class_prior(counts: NDArray[np.int64], novel_rate: float = NOVEL_RATE) -> NDArray[np.float64]:
    """A device's class prior (C,): `novel_rate` in equal parts for novel classes, the rest by the samples per class."""
    held = counts > 0
    own = np.where(held, counts + SMOOTHING, 0.0)
    rate = novel_rate if held.any() and not held.all() else float(not held.any())
    prior = (1 - rate) * own / max(own.sum(), SMOOTHING) + rate * ~held / max((~held).sum(), 1)
    return np.asarray(prior, np.float64)


def class_mask(counts: NDArray[np.int64]) -> Floats:
    """Added to logits (C,): 0 for held classes, a very low number for the others. FedRS's restricted softmax."""
    return np.asarray(np.where(counts > 0, 0.0, NEVER), np.float32)


def log_frequencies(counts: NDArray[np.int64]) -> Floats:
    """Added to logits (C,): the log share of each class in `counts` (C,), and a very low number for classes without
    samples. Training with it is logit adjustment (Menon et al., ICLR 2021; by device: FedLC, Zhang et al., ICML 2022):
    the logits themselves then have equal class priors."""
    return _log(counts / max(counts.sum(), 1))


def gate_offset(global_logits: Floats, biases: Biases) -> Floats:
    """The log gate weights (B, 2) of Bayes' rule, up to a constant, from the global expert's logits (B, C)."""
    return np.stack([log_sum_exp(global_logits + biases.kept), log_sum_exp(global_logits + biases.given)], axis=1)


def mix(log_gate: Floats, global_log_p: Floats, local_log_p: Floats) -> Floats:
    """log p(y|x) (B, C): logsumexp over both experts of log gate + log p (paper, stage 2)."""
    return np.asarray(np.logaddexp(log_gate[:, :1] + global_log_p, log_gate[:, 1:] + local_log_p), np.float32)


def class_dropout(counts: NDArray[np.int64], labels: Labels) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each class of `labels` (n,): the counts (C,) without it, and the indices of its samples. Nothing if the
    device holds one class only.

    For these samples the class is then novel to the device (ours).
    """
    for label in np.unique(labels) if (counts > 0).sum() > 1 else ():
        without = counts.copy()
        without[label] = 0
        yield without, np.flatnonzero(labels == label)


def log_sum_exp(values: Floats) -> Floats:
    """Over the last axis."""
    highest = values.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(values - highest).sum(axis=-1)) + highest[..., 0], np.float32)


def _log(probabilities: NDArray[np.float64]) -> Floats:
    """NEVER where the probability is zero."""
    return np.asarray(
        np.where(probabilities > 0, np.log(np.maximum(probabilities, MIN_PROBABILITY)), NEVER), np.float32
    )


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), np.float32)


def label_log_p(log_p: Floats, labels: Labels) -> Floats:
    """log p(yᵢ) (B,) out of (B, C)."""
    return np.asarray(log_p[np.arange(len(labels)), labels], np.float32)


def accuracy(log_p: Floats, labels: Labels) -> float:
    """Share of samples whose most likely class is the label; 0 without samples."""
    return float((log_p.argmax(axis=1) == labels).mean()) if len(labels) else 0.0


def nll(log_p: Floats, labels: Labels) -> float:
    """Mean negative log-likelihood in nats; 0 without samples."""
    return float(-label_log_p(log_p, labels).mean()) if len(labels) else 0.0


def gate_statistics(log_gate: Floats) -> tuple[float, float]:
    """Mean weight of the local expert, and mean entropy in nats (at most log 2)."""
    gate = np.exp(log_gate)
    return float(gate[:, 1].mean()), float(-(gate * log_gate).sum(axis=1).mean())
