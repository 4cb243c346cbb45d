"""AdamW (Loshchilov & Hutter 2019) on one flat vector, as torch.optim.AdamW computes it, and what it decays."""

from __future__ import annotations

import numpy as np

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.layout import HEAD, Layout

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def expert_decay(layout: Layout, size: int, weight_decay: float) -> Vector:
    """The decay of each of the first `size` trainables (P,): the LoRA's, while the head has none."""
    decay = np.full(size, weight_decay, np.float32)
    decay[layout.parts[HEAD]] = 0.0
    return decay


class AdamW:
    def __init__(self, learning_rate: float, weight_decay: Vector) -> None:
        """`weight_decay` (P,) holds one for each parameter."""
        self._rate = np.float32(learning_rate)
        self._decay = weight_decay
        self._mean = np.zeros_like(weight_decay)
        self._square = np.zeros_like(weight_decay)
        self._steps = 0

    def step(self, theta: Vector, gradient: Vector) -> Vector:
        """The parameters (P,) after one step."""
        self._steps += 1
        self._mean += (1 - BETA1) * (gradient - self._mean)
        self._square += (1 - BETA2) * (gradient * gradient - self._square)
        mean = self._mean / (1 - BETA1**self._steps)
        root = np.sqrt(self._square / (1 - BETA2**self._steps)) + EPS
        return np.asarray(theta * (1 - self._rate * self._decay) - self._rate * mean / root, np.float32)
