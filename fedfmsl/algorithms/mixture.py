"""MoFM, Mixture of Foundation Models, as functions over arrays.

Shapes: class log-probabilities (B, C); log gate weights (B, 2), the global expert first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedfmsl.algorithms.arrays import NEVER, Floats, Labels

SMOOTHING = 0.1  # samples added to each class, so that a class without samples stays possible


def mix(log_gate: Floats, global_log_p: Floats, local_log_p: Floats) -> Floats:
    """log p(y|x) (B, C): logsumexp over both experts of log gate + log p (paper, stage 2)."""
    return np.asarray(np.logaddexp(log_gate[:, :1] + global_log_p, log_gate[:, 1:] + local_log_p), np.float32)


def log_class_prior(counts: NDArray[np.int64]) -> Floats:
    """A device's log class prior (C,) from its samples per class (ours)."""
    smoothed = counts + SMOOTHING
    return np.asarray(np.log(smoothed / smoothed.sum()), np.float32)


def class_mask(counts: NDArray[np.int64]) -> Floats:
    """Added to logits (C,): 0 for held classes, a very low number for the others. FedRS's restricted softmax."""
    return np.asarray(np.where(counts > 0, 0.0, NEVER), np.float32)


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
