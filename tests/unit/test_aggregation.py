"""Aggregation of updates that are read one at a time."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedfmsl.algorithms.aggregation import (
    SORT_BYTES,
    AggregationRule,
    Contribution,
    CoordinateMedian,
    ScreenedMean,
    TrimmedMean,
    WeightedMean,
)
from fedfmsl.algorithms.arrays import Vector

PARTS = {"head": slice(0, 3), "1": slice(3, 5), "0": slice(5, 7)}
RULES: list[AggregationRule] = [WeightedMean(), ScreenedMean(), TrimmedMean(), CoordinateMedian()]
of = Contribution.of


def random_contributions(shape: Sequence[tuple[int, int]], seed: int) -> list[Contribution]:
    rng = np.random.default_rng(seed)
    return [of(rng.normal(size=size).astype(np.float32), float(weight)) for size, weight in shape]


SHAPES = st.lists(st.tuples(st.sampled_from([3, 5, 7]), st.integers(0, 20)), max_size=9)
SEED = st.integers(0, 99)
ANY_RULE = st.one_of(
    st.sampled_from([WeightedMean(), CoordinateMedian()]),
    st.builds(TrimmedMean, trim=st.sampled_from([0.0, 0.125, 0.25, 0.45])),
)


def reference(rule: AggregationRule, rows: list[NDArray[np.float64]], weights: list[float]) -> NDArray[np.float64]:
    if isinstance(rule, TrimmedMean):
        cut = max(int(rule.trim * len(rows)), rule.trim > 0 and len(rows) > 2)
        return np.asarray(np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0))
    if isinstance(rule, CoordinateMedian):
        return np.asarray(np.median(rows, axis=0))
    return np.asarray(np.average(rows, axis=0, weights=weights))


@settings(max_examples=200)
@given(SHAPES, st.integers(1, 3), SEED, ANY_RULE)
def test_each_part_is_aggregated_over_the_contributions_that_trained_it(
    shape: list[tuple[int, int]], count: int, seed: int, rule: AggregationRule
) -> None:
    parts = dict(list(PARTS.items())[:count])
    size = list(parts.values())[-1].stop
    contributions = random_contributions([(min(own, size), weight) for own, weight in shape], seed)
    result = rule.aggregate(contributions, parts)
    assert result.delta.dtype == np.float64
    assert result.delta.shape == (size,)
    covered = np.zeros(size, bool)
    for span in result.trained:
        covered[span] = True
    for part in parts.values():
        trained = [c for c in contributions if c.size >= part.stop and c.weight]
        assert covered[part].all() == covered[part].any() == bool(trained)
        if trained:
            rows = [c.read()[part].astype(np.float64) for c in trained]
            assert np.allclose(result.delta[part], reference(rule, rows, [c.weight for c in trained]), atol=1e-12)
        else:
            assert not result.delta[part].any()
    assert rule.aggregate(contributions, parts).delta.tobytes() == result.delta.tobytes()


@given(SHAPES, SEED, st.sampled_from([TrimmedMean, CoordinateMedian]))
def test_the_ranges_of_coordinates_do_not_change_the_result(
    shape: list[tuple[int, int]], seed: int, rule: type[TrimmedMean | CoordinateMedian]
) -> None:
    contributions = random_contributions(shape, seed)
    whole, ranges = (rule(sort_bytes=size).aggregate(contributions, PARTS) for size in (SORT_BYTES, 40))
    assert ranges.delta.tobytes() == whole.delta.tobytes()


@pytest.mark.parametrize(
    "rule",
    [
        WeightedMean(),
        ScreenedMean(),
        ScreenedMean(memory_bytes=40),
        TrimmedMean(sort_bytes=40),
        CoordinateMedian(sort_bytes=40),
    ],
)
def test_contributions_are_read_in_turn_and_nothing_is_left_on_the_disk(rule: AggregationRule, tmp_path: Path) -> None:
    reads: list[int] = []

    def read(device: int) -> Vector:
        reads.append(device)
        return np.full(7 - 2 * (device % 3), 1 + device, np.float32)

    sizes = [7 - 2 * (device % 3) for device in range(9)]
    contributions = [Contribution(1.0, size, partial(read, device)) for device, size in enumerate(sizes)]
    result = rule.aggregate(contributions, PARTS, scratch=tmp_path).delta
    often = isinstance(rule, ScreenedMean) and rule.memory_bytes == 40
    assert reads == list(range(9)) * (3 if often else 1)
    assert not any(tmp_path.iterdir())
    assert result.tolist() == [5.0] * 3 + [4.5] * 2 + [4.0] * 2


def test_a_part_with_too_few_contributions_stays_untrained() -> None:
    contributions = random_contributions([(7, 1), (5, 1), (5, 1), (3, 1), (7, 0)], 0)
    spans = {least: WeightedMean().aggregate(contributions, PARTS, least).trained for least in (1, 2, 4, 5)}
    ends = {least: max((span.stop for span in trained), default=0) for least, trained in spans.items()}
    assert ends == {1: 7, 2: 5, 4: 3, 5: 0}
    assert not WeightedMean().aggregate(contributions, PARTS, 4).delta[3:].any()


@given(st.integers(3, 15), st.data())
def test_median_and_trimmed_mean_stay_in_the_range_of_the_honest_updates(devices: int, data: Any) -> None:
    bad = data.draw(st.integers(1, (devices - 1) // 2))
    rng = np.random.default_rng(data.draw(SEED))
    honest = rng.normal(size=(devices - bad, 7)).astype(np.float32)
    hostile = rng.choice([-1e30, 1e30, 0, 1e-30], size=(bad, 7)).astype(np.float32)
    contributions = [*(of(row, 1.0) for row in honest), *(of(row, 1e9) for row in hostile)]
    for rule in (CoordinateMedian(), TrimmedMean(trim=bad / devices)):
        result = rule.aggregate(contributions, PARTS).delta
        assert (result >= honest.min(axis=0)).all()
        assert (result <= honest.max(axis=0)).all()


@given(st.floats(0.01, 10), SEED)
def test_an_update_is_clipped_to_the_norm(clip: float, seed: int) -> None:
    contributions = random_contributions([(7, 1), (3, 2), (7, 4)], seed)
    result = WeightedMean(clip=clip).aggregate(contributions, PARTS)
    scaled = [of(c.read() * np.float32(min(1, clip / np.linalg.norm(c.read()))), c.weight) for c in contributions]
    assert np.allclose(result.delta, WeightedMean().aggregate(scaled, PARTS).delta, atol=1e-6)
    alone = WeightedMean(clip=clip).aggregate(contributions[:1], PARTS).delta
    assert np.linalg.norm(alone) <= clip * (1 + 1e-6)


WIDE = {"head": slice(0, 50_000), "0": slice(50_000, 100_000)}
TOTAL = 100_000


def peak_bytes(rule: AggregationRule, devices: int) -> int:
    """The peak memory of aggregation over updates that are created when they are read."""

    def read(device: int) -> Vector:
        return np.full(TOTAL, device, np.float32)

    contributions = [Contribution(1.0, TOTAL, lambda device=device: read(device)) for device in range(devices)]
    tracemalloc.start()
    rule.aggregate(contributions, WIDE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_the_memory_of_the_mean_does_not_grow_with_the_devices() -> None:
    peak_bytes(WeightedMean(), 3)  # numpy keeps memory from its first use
    few, many = peak_bytes(WeightedMean(), 3), peak_bytes(WeightedMean(), 300)
    assert many <= few + 64 * 1024  # a few words per device, not the 400 kB of its update


@pytest.mark.parametrize(
    "rule", [CoordinateMedian(sort_bytes=2**20), TrimmedMean(sort_bytes=2**20), ScreenedMean(memory_bytes=2**20)]
)
def test_the_memory_of_robust_rules_is_bounded(rule: AggregationRule) -> None:
    peak = peak_bytes(rule, 20)
    assert peak < 2**20 + 3 * 8 * TOTAL  # a range of coordinates, the result, one update
    assert peak < 20 * 4 * TOTAL  # less than all updates at once


def test_aggregation_does_not_change_its_arguments() -> None:
    vector = np.arange(7, dtype=np.float32)
    for rule in RULES:
        replace(rule, clip=0.1).aggregate([of(vector, 2.0)], PARTS)
    assert vector.tolist() == list(range(7))


@pytest.mark.parametrize(("devices", "hostile"), [(3, 1), (4, 1), (6, 1), (10, 2), (100, 20)])
def test_the_default_rule_cuts_a_minority_from_three_devices_on(devices: int, hostile: int) -> None:
    honest = np.random.default_rng(devices).normal(size=(devices - hostile, 7)).astype(np.float32)
    contributions = [of(row) for row in honest] + [of(np.full(7, -1e6, np.float32))] * hostile
    result = TrimmedMean().aggregate(contributions, PARTS).delta
    assert (result >= honest.min(axis=0)).all()
    assert (TrimmedMean(trim=0).aggregate(contributions, PARTS).delta < honest.min(axis=0)).all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TrimmedMean(trim=0.5), "TrimmedMean.trim is 0.5; it must be at least 0 and below 0.5"),
        (lambda: WeightedMean(clip=0.0), "WeightedMean.clip is 0.0; it must be above 0"),
        (lambda: CoordinateMedian(sort_bytes=0), "CoordinateMedian.sort_bytes is 0"),
        (lambda: of(np.zeros(3, np.float32), -1.0), "Contribution.weight is -1.0; it must be at least 0"),
        (lambda: of(np.zeros(3, np.float32), np.nan), "Contribution.weight is nan; it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [0, 4, 8])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_contribution_that_ends_within_a_part_is_refused(rule: AggregationRule, size: int, weight: float) -> None:
    text = rf"Contribution.size is {size}; it must be the end of a part, one of \[3, 5, 7\]"
    with pytest.raises(ValueError, match=text):
        rule.aggregate([of(np.zeros(7, np.float32)), of(np.zeros(size, np.float32), weight)], PARTS)


def test_a_setting_that_is_no_number_is_refused_by_name() -> None:
    wrong: Any = "0.1"
    with pytest.raises(TypeError, match=r"TrimmedMean.trim is '0.1'; it must be a number"):
        TrimmedMean(trim=wrong)
