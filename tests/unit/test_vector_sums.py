"""Sums and products of many vectors: of 8-bit steps in exact blocks, of float32 one by one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedfmsl.algorithms.aggregation import Contribution, ScreenedMean, WeightedMean
from fedfmsl.algorithms.arrays import Doubles
from fedfmsl.algorithms.bounds import l2_norm
from fedfmsl.algorithms.steps import Steps, dense, norm_of
from fedfmsl.algorithms.vector_sums import ROWS, WIDTH, products, weighted_sums

ENDS = (2 * WIDTH + 5, 2 * WIDTH + 9, 3 * WIDTH, 3 * WIDTH + 700)
PARTS = {"head": slice(0, ENDS[1]), "1": slice(ENDS[1], ENDS[2]), "0": slice(ENDS[2], ENDS[3])}


def of(steps: NDArray[np.int8], scales: Doubles) -> Steps:
    return Steps(tuple(np.split(steps, ENDS[: len(scales) - 1])), scales, ENDS)


def updates(count: int, seed: int = 0) -> list[Steps]:
    """Of different levels, with scales from 1e-9 to 1e3."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        slots = int(rng.integers(2, len(ENDS) + 1))
        steps = rng.integers(-128, 128, ENDS[slots - 1]).astype(np.int8)
        found.append(of(steps, (10.0 ** rng.uniform(-9, 3, slots)).astype(np.float32).astype(np.float64)))
    return found


def exact(steps: Steps) -> Doubles:
    row = np.zeros(ENDS[-1])
    for span, values, scale in zip(steps.slots(), steps.values, steps.scales, strict=True):
        row[span] = values * scale
    return row


def test_sums_and_products_of_steps_are_those_of_their_values() -> None:
    steps = updates(2 * ROWS + 3)
    rows = np.array([exact(each) for each in steps])
    weights = np.random.default_rng(1).normal(size=(2, len(steps)))
    weights[:, 5] = 0.0
    read: list[int] = []
    sums = weighted_sums(lambda index: read.append(index) or steps[index], weights, ENDS[-1])
    assert read == [index for index in range(len(steps)) if index != 5]
    largest = np.array([np.abs(rows[:, span]).max() for span in (slice(0, ENDS[0]), slice(ENDS[2], ENDS[3]))])
    for span, most in zip((slice(0, ENDS[0]), slice(ENDS[2], ENDS[3])), largest, strict=True):
        assert np.abs(sums - weights @ rows)[:, span].max() < most * 1e-10
    vector = np.random.default_rng(2).normal(size=ENDS[-1])
    found = products(steps.__getitem__, range(len(steps)), vector)
    assert np.allclose(found, rows @ vector, rtol=0, atol=np.abs(rows).max() * 1e-7)
    for each, row in zip(steps[:9], rows, strict=False):
        assert norm_of(each) == pytest.approx(np.linalg.norm(row), rel=1e-14)
        assert norm_of(each) == pytest.approx(l2_norm(dense(each)), rel=1e-6)


def test_the_sums_of_steps_do_not_depend_on_the_order_in_which_a_processor_adds() -> None:
    """The rows of one block in reverse, and its columns in other blocks of the BLAS product."""
    steps = updates(ROWS)
    weights = np.random.default_rng(1).normal(size=(1, ROWS))
    there = weighted_sums(steps.__getitem__, weights, ENDS[-1])
    back = weighted_sums(steps[::-1].__getitem__, weights[:, ::-1], ENDS[-1])
    assert there.tobytes() == back.tobytes()
    vector = np.random.default_rng(2).normal(size=ENDS[-1])
    found = products(steps.__getitem__, range(ROWS), vector)
    assert found == products(steps[::-1].__getitem__, range(ROWS), vector)[::-1]


def test_rules_give_the_same_for_steps_as_for_the_vectors() -> None:
    rng = np.random.default_rng(3)
    shared = rng.integers(-80, 80, ENDS[-1])
    sizes = rng.choice(ENDS[1:], 12)
    rows = [(shared[:size] + rng.integers(-30, 31, size)).astype(np.int8) for size in sizes]
    steps = [of(row, np.full(ENDS.index(row.size) + 1, 1e-3)) for row in rows]
    steps[3] = of(rows[3], -40 * steps[3].scales)  # against the others, and too long
    short = [Contribution(1.0 + index, each.size, lambda each=each: each) for index, each in enumerate(steps)]
    long = [Contribution.of(dense(each), 1.0 + index) for index, each in enumerate(steps)]
    for rule in (WeightedMean(), ScreenedMean(), ScreenedMean(clip=4.0, memory_bytes=1)):
        one, other = rule.aggregate(short, PARTS), rule.aggregate(long, PARTS)
        assert np.allclose(one.delta, other.delta, rtol=0, atol=1e-7)
        assert one.trained == other.trained
        assert np.allclose(np.array(one.agreements, float), np.array(other.agreements, float), rtol=0, atol=1e-6)
