"""Server optimizers: how the combined update changes the globals.

    current, moments = FedAdam(learning_rate=0.01).step(current, combined, moments)

The combined update takes the place of the negative gradient (Reddi et al., "Adaptive Federated Optimization",
ICLR 2021).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from fedfmsl.algorithms.aggregation import Aggregate
from fedfmsl.algorithms.arrays import Doubles, Vector
from fedfmsl.algorithms.checks import check_range


@dataclass(frozen=True)
class Moments:
    """An optimizer's state, each (P,): running means of the updates and of their squares."""

    first: Vector
    second: Vector

    @classmethod
    def zeros(cls, size: int) -> Moments:
        return cls(np.zeros(size, np.float32), np.zeros(size, np.float32))


@dataclass(frozen=True, kw_only=True)
class ServerOptimizer(ABC):
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "learning_rate", above=0)

    def step(self, current: Vector, combined: Aggregate, moments: Moments) -> tuple[Vector, Moments]:
        """The globals (P,) and the moments after one combined update. The arguments are not changed.

        Parts that were not trained keep their values and moments. Computes in float64 and rounds once.
        """
        result, first, second = current.copy(), moments.first.copy(), moments.second.copy()
        for part in combined.trained:
            before = np.asarray(first[part], np.float64), np.asarray(second[part], np.float64)
            direction, first[part], second[part] = self._direction(combined.delta[part], *before)
            result[part] = current[part] + self.learning_rate * direction
        return result, Moments(first, second)

    @abstractmethod
    def _direction(self, delta: Doubles, first: Doubles, second: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        """The step at learning rate 1 and the new moments, from the update and the moments of a part."""


@dataclass(frozen=True, kw_only=True)
class FedAvg(ServerOptimizer):
    """Adds the update (McMahan et al., AISTATS 2017)."""

    def _direction(self, delta: Doubles, first: Doubles, second: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        return delta, first, second


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerOptimizer):
    """v ← β·v + Δ, with β the `momentum` (Hsu et al., 2019)."""

    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "momentum", at_least=0, below=1)

    def _direction(self, delta: Doubles, first: Doubles, second: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        first = self.momentum * first + delta
        return first, first, second


@dataclass(frozen=True, kw_only=True)
class FedAdam(ServerOptimizer):
    """Algorithm 2 of Reddi et al., without bias correction. Both moments start from zero; the paper's analysis lets
    the second start from τ² or more."""

    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "beta1", at_least=0, below=1)
        check_range(self, "beta2", at_least=0, below=1)
        check_range(self, "tau", above=0)

    def _direction(self, delta: Doubles, first: Doubles, second: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        first = self.beta1 * first + (1 - self.beta1) * delta
        second = self.beta2 * second + (1 - self.beta2) * delta**2
        return first / (np.sqrt(second) + self.tau), first, second
