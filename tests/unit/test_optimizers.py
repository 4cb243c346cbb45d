"""Server optimizers against the formulas of their papers, value by value."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import pytest

from fedfmsl.algorithms.aggregation import Aggregate
from fedfmsl.algorithms.server_optimizers import FedAdam, FedAvg, FedAvgM, Moments, ServerOptimizer

SIZE = 6
OPTIMIZERS = [FedAvg(), FedAvgM(), FedAdam()]
ALL = (slice(0, SIZE),)


def updates(rounds: int, trained: tuple[slice, ...] = ALL) -> list[Aggregate]:
    rng = np.random.default_rng(3)
    return [Aggregate(rng.normal(size=SIZE) * 10.0 ** rng.integers(-3, 2, SIZE), trained) for _ in range(rounds)]


def run(optimizer: ServerOptimizer, rounds: list[Aggregate]) -> np.ndarray:
    current, moments = np.ones(SIZE, np.float32), Moments.zeros(SIZE)
    for aggregate in rounds:
        current, moments = optimizer.step(current, aggregate, moments)
    return current


def test_fedavg_adds_the_update_and_rounds_once() -> None:
    rng = np.random.default_rng(0)
    current = rng.normal(size=1000).astype(np.float32)
    delta = rng.normal(size=1000) * 10.0 ** rng.integers(-9, 9, 1000)
    result, _ = FedAvg().step(current, Aggregate(delta, (slice(0, 1000),)), Moments.zeros(1000))
    assert result.dtype == np.float32
    assert np.array_equal(result, (current.astype(np.float64) + delta).astype(np.float32))


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_fedavgm_follows_its_paper(rate: float) -> None:
    rounds = updates(9)
    result = run(FedAvgM(learning_rate=rate, momentum=0.7), rounds)
    for index in range(SIZE):
        x, v = 1.0, 0.0
        for aggregate in rounds:
            v = 0.7 * v + aggregate.delta[index]
            x += rate * v
        assert result[index] == pytest.approx(x, rel=1e-5, abs=1e-5)


def test_fedadam_follows_algorithm_2_of_its_paper() -> None:
    rounds = updates(9)
    result = run(FedAdam(learning_rate=0.1, beta1=0.8, beta2=0.95, tau=1e-2), rounds)
    for index in range(SIZE):
        x, m, v = 1.0, 0.0, 0.0
        for aggregate in rounds:
            delta = aggregate.delta[index]
            m = 0.8 * m + 0.2 * delta
            v = 0.95 * v + 0.05 * delta**2
            x += 0.1 * m / (sqrt(v) + 1e-2)
        assert result[index] == pytest.approx(x, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_untrained_parts_keep_their_values_and_moments(optimizer: ServerOptimizer) -> None:
    first, second = updates(1)[0], updates(1, (slice(0, 2),))[0]
    current, moments = optimizer.step(np.ones(SIZE, np.float32), first, Moments.zeros(SIZE))
    result, after = optimizer.step(current, second, moments)
    for before, later in ((current, result), (moments.first, after.first), (moments.second, after.second)):
        assert before[2:].tobytes() == later[2:].tobytes()
    assert (result[:2] != current[:2]).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_does_not_change_its_arguments(optimizer: ServerOptimizer) -> None:
    current, moments = np.ones(SIZE, np.float32), Moments.zeros(SIZE)
    optimizer.step(current, updates(1)[0], moments)
    assert current.tolist() == [1] * SIZE
    assert not moments.first.any()
    assert not moments.second.any()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FedAvg(learning_rate=0.0), "FedAvg.learning_rate is 0.0; it must be above 0"),
        (lambda: FedAvgM(momentum=1.0), "FedAvgM.momentum is 1.0; it must be at least 0 and below 1"),
        (lambda: FedAdam(beta2=-0.1), "FedAdam.beta2 is -0.1"),
        (lambda: FedAdam(tau=0.0), "FedAdam.tau is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
