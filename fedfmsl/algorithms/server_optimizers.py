"""What the server does with the aggregated update: optimizers of federated optimization, as functions over vectors.

The update plays the negative gradient's part (Reddi et al., "Adaptive Federated Optimization", ICLR 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedfmsl.algorithms.aggregation import Aggregate
from fedfmsl.algorithms.arrays import Doubles, Vector
from trainer_server.config import Aggregation, Optimizer


@dataclass(frozen=True)
class Moments:
    """What an optimizer remembers of earlier rounds, both (size,): the mean of the updates and of their squares."""

    first: Vector
    second: Vector

    @classmethod
    def zeros(cls, size: int) -> Moments:
        return cls(np.zeros(size, np.float32), np.zeros(size, np.float32))


def step(settings: Aggregation, current: Vector, aggregate: Aggregate, moments: Moments) -> tuple[Vector, Moments]:
    """The globals (size,) after one more aggregated update, and the moments after it. Parts that nobody trained keep
    their values and moments. Computed in float64 and rounded once."""
    result, first, second = current.copy(), moments.first.copy(), moments.second.copy()
    move = OPTIMIZERS[settings.optimizer]
    for part in aggregate.trained:
        before = np.asarray(first[part], np.float64), np.asarray(second[part], np.float64)
        direction, first[part], second[part] = move(settings, aggregate.delta[part], *before)
        result[part] = current[part] + settings.learning_rate * direction
    return result, Moments(first, second)


def _fedavg(_: Aggregation, delta: Doubles, first: Doubles, second: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    return delta, first, second


def _fedavgm(
    settings: Aggregation, delta: Doubles, first: Doubles, second: Doubles
) -> tuple[Doubles, Doubles, Doubles]:
    """Hsu et al., 2019: v ← β·v + Δ."""
    first = settings.momentum * first + delta
    return first, first, second


def _fedadam(
    settings: Aggregation, delta: Doubles, first: Doubles, second: Doubles
) -> tuple[Doubles, Doubles, Doubles]:
    """Reddi et al., Algorithm 2, which corrects no bias. Both moments start from zero; their analysis lets the second
    start from τ² at least."""
    first = settings.momentum * first + (1 - settings.momentum) * delta
    second = settings.beta2 * second + (1 - settings.beta2) * delta**2
    return first / (np.sqrt(second) + settings.tau), first, second


OPTIMIZERS: dict[Optimizer, Callable[[Aggregation, Doubles, Doubles, Doubles], tuple[Doubles, Doubles, Doubles]]] = {
    Optimizer.FEDAVG: _fedavg,
    Optimizer.FEDAVGM: _fedavgm,
    Optimizer.FEDADAM: _fedadam,
}
