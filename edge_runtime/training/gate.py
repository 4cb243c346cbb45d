"""The gate of MoFM. It is trained on held-out samples, because the local expert may have memorized the others."""

from __future__ import annotations

import numpy as np

from edge_runtime.engines.sessions import open_session, run
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.protocol.bundle import Bundle

# Ours, chosen on held-out samples. Splits are small, and with more steps the gate collapses onto one expert.
STEPS = 5
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
MIN_LOG_P = -30.0


class Gate:
    """Runs the two gate graphs of a bundle."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._step = open_session(bundle, "gate-step.onnx", threads)
        self._predict = open_session(bundle, "gate-predict.onnx", threads)

    def log_weights(self, theta: Vector, features: Floats) -> Floats:
        """Log weights (n, 2) of the global and the local expert, for features (n, F) and a gate adapter (G,)."""
        (log_gate,) = run(self._predict, ["log_gate"], {"pooled": features, "gate_theta": theta})
        return log_gate

    def train(self, theta: Vector, features: Floats, expert_log_p: Floats) -> Vector:
        """The gate adapter (G,) after STEPS full-batch steps on the mixture's negative log-likelihood.

        `expert_log_p` (n, 2): log-likelihood of the labels under the global and the local expert.
        """
        optimizer = AdamW(LEARNING_RATE, np.full_like(theta, WEIGHT_DECAY))
        weights = np.full(len(features), 1 / len(features), np.float32)
        expert_log_p = np.maximum(expert_log_p, MIN_LOG_P)
        for _ in range(STEPS):
            inputs = {"pooled": features, "expert_log_p": expert_log_p, "weights": weights, "gate_theta": theta}
            _, gradient = run(self._step, ["loss", "gradient"], inputs)
            theta = optimizer.step(theta, gradient)
        return theta
