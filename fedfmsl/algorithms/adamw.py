"""AdamW (Loshchilov & Hutter 2019) on one flat vector, as torch.optim.AdamW computes it."""

from __future__ import annotations

import numpy as np

from fedfmsl.algorithms.arrays import Vector

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class AdamW:
    def __init__(self, learning_rate: float, weight_decay: Vector) -> None:
        """`weight_decay` (P,): one value for each parameter."""
        self._rate = np.float32(learning_rate)
        self._decay = weight_decay
        self._mean = np.zeros_like(weight_decay)
        self._square = np.zeros_like(weight_decay)
        self._steps = 0

    def step(self, theta: Vector, gradient: Vector) -> Vector:
        """The parameters (P,) after one step. Does not change its arguments."""
        self._steps += 1
        self._mean += (1 - BETA1) * (gradient - self._mean)
        self._square += (1 - BETA2) * (gradient * gradient - self._square)
        mean = self._mean / (1 - BETA1**self._steps)
        root = np.sqrt(self._square / (1 - BETA2**self._steps)) + EPS
        return np.asarray(theta * (1 - self._rate * self._decay) - self._rate * mean / root, np.float32)
