"""The gate of MoFM. It is trained on held-out samples, because the local expert may have memorized the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from edge_runtime.engines.sessions import open_session, run
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import Floats, Vector
from fedfmsl.protocol.task_bundle import TaskBundle

# Ours, chosen on held-out samples. Splits are small, and with more steps the gate collapses onto one expert.
STEPS = 5
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
MIN_LOG_P = -30.0


@dataclass(frozen=True)
class GateExamples:
    """n training examples of the gate: features (n, F), log weights of Bayes' rule `offset` (n, 2), both experts'
    log-likelihood of the label (n, 2), and weights in the loss (n,)."""

    features: Floats
    offset: Floats
    expert_log_p: Floats
    weights: Floats

    @classmethod
    def concatenate(cls, parts: Sequence[GateExamples]) -> GateExamples:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


class Gate:
    """Runs the two gate graphs of a bundle."""

    def __init__(self, bundle: TaskBundle, threads: int) -> None:
        self._step = open_session(bundle, "gate-step.onnx", threads)
        self._predict = open_session(bundle, "gate-predict.onnx", threads)

    def log_weights(self, theta: Vector, features: Floats, offset: Floats) -> Floats:
        """Log weights (n, 2) of the global and the local expert.

        For features (n, F), a gate adapter (G,), and the log weights of Bayes' rule, `offset` (n, 2).
        """
        inputs = {"pooled": features, "offset": offset, "gate_theta": theta}
        (log_gate,) = run(self._predict, ["log_gate"], inputs)
        return log_gate

    def train(self, theta: Vector, examples: GateExamples) -> Vector:
        """The gate adapter (G,) after STEPS full-batch steps on the mixture's negative log-likelihood."""
        optimizer = AdamW(LEARNING_RATE, np.full_like(theta, WEIGHT_DECAY))
        inputs = {
            "pooled": examples.features,
            "offset": examples.offset,
            "expert_log_p": np.maximum(examples.expert_log_p, MIN_LOG_P),
            "weights": examples.weights,
        }
        for _ in range(STEPS):
            _, gradient = run(self._step, ["loss", "gradient"], {**inputs, "gate_theta": theta})
            theta = optimizer.step(theta, gradient)
        return theta
