"""Aggregation of updates that are read one at a time."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedfmsl.algorithms import aggregation
from fedfmsl.algorithms.aggregation import Contribution, aggregate, weighted_average
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.protocol.layout import Layout
from trainer_server.config import Aggregation, Rule

LAYOUT = Layout.build([("head", "w", (3,)), ("1", "a", (2,)), ("0", "b", (2,))])
PARTS = (slice(0, 3), slice(3, 5), slice(5, 7))


def of(vector: Vector, weight: float = 1.0) -> Contribution:
    return Contribution(weight, vector.size, lambda: vector)


def drawn(shape: Sequence[tuple[int, int]], seed: int) -> list[Contribution]:
    rng = np.random.default_rng(seed)
    return [of(rng.normal(size=size).astype(np.float32), float(weight)) for size, weight in shape]


SHAPES = st.lists(st.tuples(st.sampled_from([3, 4, 5, 7]), st.integers(0, 20)), max_size=9)
SIZE = st.sampled_from([3, 5, 7])
SEED = st.integers(0, 99)


def reference(rule: Rule, trim: float, rows: list[NDArray[np.float64]], weights: list[float]) -> NDArray[np.float64]:
    if rule is Rule.MEAN:
        return np.asarray(np.average(rows, axis=0, weights=weights))
    if rule is Rule.MEDIAN:
        return np.asarray(np.median(rows, axis=0))
    cut = int(trim * len(rows))
    return np.asarray(np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0))


@settings(max_examples=200)
@given(SHAPES, SIZE, SEED, st.sampled_from(Rule), st.sampled_from([0.0, 0.125, 0.25, 0.45]))
def test_each_part_is_aggregated_over_those_who_trained_it(
    shape: list[tuple[int, int]], size: int, seed: int, rule: Rule, trim: float
) -> None:
    contributions = drawn(shape, seed)
    setting = Aggregation(rule=rule, trim=trim)
    result = aggregate(setting, LAYOUT, size, contributions)
    assert result.delta.dtype == np.float64
    assert result.delta.shape == (size,)
    covered = np.zeros(size, bool)
    for span in result.trained:
        covered[span] = True
    for part in PARTS:
        if part.stop > size:
            continue
        trained = [c for c in contributions if c.size >= part.stop and c.weight]
        assert covered[part].all() == covered[part].any() == bool(trained)
        if trained:
            rows = [c.read()[part].astype(np.float64) for c in trained]
            assert np.allclose(result.delta[part], reference(rule, trim, rows, [c.weight for c in trained]), atol=1e-12)
        else:
            assert not result.delta[part].any()
    assert aggregate(setting, LAYOUT, size, contributions).delta.tobytes() == result.delta.tobytes()


@given(SHAPES, SEED, st.sampled_from(Rule))
def test_slices_of_coordinates_change_nothing(shape: list[tuple[int, int]], seed: int, rule: Rule) -> None:
    contributions, setting = drawn(shape, seed), Aggregation(rule=rule)
    whole = aggregate(setting, LAYOUT, 7, contributions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregation, "SLICE_BYTES", 40)
        assert aggregate(setting, LAYOUT, 7, contributions).delta.tobytes() == whole.delta.tobytes()


def test_a_part_of_too_few_is_left_as_it_is() -> None:
    contributions = drawn([(7, 1), (5, 1), (5, 1), (3, 1), (7, 0)], 0)
    spans = {least: aggregate(Aggregation(), LAYOUT, 7, contributions, least).trained for least in (1, 2, 4, 5)}
    ends = {least: max((span.stop for span in trained), default=0) for least, trained in spans.items()}
    assert ends == {1: 7, 2: 5, 4: 3, 5: 0}
    assert not aggregate(Aggregation(), LAYOUT, 7, contributions, 4).delta[3:].any()


@given(st.integers(3, 15), st.data())
def test_the_median_and_the_trimmed_mean_stay_within_the_honest_whatever_the_others_send(
    devices: int, data: Any
) -> None:
    bad = data.draw(st.integers(1, (devices - 1) // 2))
    rng = np.random.default_rng(data.draw(SEED))
    honest = rng.normal(size=(devices - bad, 7)).astype(np.float32)
    lies = rng.choice([-1e30, 1e30, 0, 1e-30], size=(bad, 7)).astype(np.float32)
    contributions = [*(of(row, 1.0) for row in honest), *(of(row, 1e9) for row in lies)]
    for setting in (Aggregation(rule=Rule.MEDIAN), Aggregation(rule=Rule.TRIMMED_MEAN, trim=bad / devices)):
        result = aggregate(setting, LAYOUT, 7, contributions).delta
        assert (result >= honest.min(axis=0)).all()
        assert (result <= honest.max(axis=0)).all()


@given(st.floats(0.01, 10), SEED)
def test_no_update_counts_with_more_than_the_clipping_norm(clip: float, seed: int) -> None:
    contributions = drawn([(7, 1), (3, 2), (7, 4)], seed)
    result = aggregate(Aggregation(clip=clip), LAYOUT, 7, contributions)
    scaled = [of(c.read() * np.float32(min(1, clip / np.linalg.norm(c.read()))), c.weight) for c in contributions]
    assert np.allclose(result.delta, aggregate(Aggregation(), LAYOUT, 7, scaled).delta, atol=1e-6)
    alone = aggregate(Aggregation(clip=clip), LAYOUT, 7, contributions[:1]).delta
    assert np.linalg.norm(alone) <= clip * (1 + 1e-6)


WIDE = Layout.build([("head", "w", (1000, 50)), ("0", "a", (1000, 50))])


def peak_bytes(rule: Rule, devices: int) -> int:
    """What aggregation allocates at most at once, over updates that are made as they are read."""

    def read(device: int) -> Vector:
        return np.full(WIDE.total, device, np.float32)

    contributions = [Contribution(1.0, WIDE.total, lambda device=device: read(device)) for device in range(devices)]
    tracemalloc.start()
    aggregate(Aggregation(rule=rule), WIDE, WIDE.total, contributions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_the_means_memory_does_not_grow_with_the_devices() -> None:
    peak_bytes(Rule.MEAN, 3)  # what numpy keeps from its first use
    few, many = peak_bytes(Rule.MEAN, 3), peak_bytes(Rule.MEAN, 300)
    assert many <= few + 64 * 1024  # a few words per device, not the 400 kB of its update


@pytest.mark.parametrize("rule", [Rule.MEDIAN, Rule.TRIMMED_MEAN])
def test_the_robust_rules_memory_is_bounded(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "SLICE_BYTES", 2**20)
    peak = peak_bytes(rule, 20)
    assert peak < 2**20 + 3 * 8 * WIDE.total  # a slice, the result, an update as it is read
    assert peak < 20 * 4 * WIDE.total  # less than all updates at once


def test_aggregation_leaves_its_arguments_as_they_were() -> None:
    vector = np.arange(7, dtype=np.float32)
    for rule in Rule:
        aggregate(Aggregation(rule=rule, clip=0.1), LAYOUT, 7, [of(vector, 2.0)])
    assert vector.tolist() == list(range(7))


def test_weighted_average_of_nothing_is_zero() -> None:
    assert weighted_average([]) == weighted_average([(0.7, 0.0)]) == 0.0
    assert weighted_average([(1.0, 1.0), (0.0, 3.0)]) == 0.25
