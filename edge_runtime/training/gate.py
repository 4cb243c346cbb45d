"""The gate adapter. It is trained on held-out images: on those an expert has memorised it would learn only that."""

from __future__ import annotations

import numpy as np

from edge_runtime.engines.sessions import open_session, run
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.protocol.bundle import Bundle

# Ours, chosen on held-out images: slices are small, and a gate that is trained longer collapses onto one expert.
STEPS = 5
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
LEAST_LOG_P = -30.0


class Gate:
    """The two gate graphs of a bundle."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._step = open_session(bundle, "gate-step.onnx", threads)
        self._predict = open_session(bundle, "gate-predict.onnx", threads)

    def weights(self, theta: Vector, pooled: Floats) -> Floats:
        """Log weights (n, 2) of the global and the local expert, from pooled features (n, F)."""
        (log_gate,) = run(self._predict, ["log_gate"], {"pooled": pooled, "gate_theta": theta})
        return log_gate

    def train(self, theta: Vector, pooled: Floats, expert_log_p: Floats) -> Vector:
        """Full-batch steps on the mixture's negative log-likelihood; `expert_log_p` (n, 2) are both experts'
        log-likelihoods of the labels, global first."""
        optimizer = AdamW(LEARNING_RATE, np.full_like(theta, WEIGHT_DECAY))
        weights = np.full(len(pooled), 1 / len(pooled), np.float32)
        expert_log_p = np.maximum(expert_log_p, LEAST_LOG_P)
        for _ in range(STEPS):
            inputs = {"pooled": pooled, "expert_log_p": expert_log_p, "weights": weights, "gate_theta": theta}
            _, gradient = run(self._step, ["loss", "gradient"], inputs)
            theta = optimizer.step(theta, gradient)
        return theta
