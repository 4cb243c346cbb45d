"""Own, fleet, novel, stream, harmonic and worst decile from predictions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfmsl.algorithms.arrays import Bools, Labels
from fedfmsl.algorithms.evaluation import (
    SHARES,
    DeviceAccuracy,
    adapting_streams,
    device_accuracy,
    harmonic_mean,
    novel_samples,
    stream_accuracy,
    stream_order,
    summarize,
    worst_decile,
)
from fedfmsl.algorithms.label_shift import MIN_SAMPLES
from fedfmsl.algorithms.mixture import log_softmax

CLASSES = 5


@dataclass(frozen=True)
class Fleet:
    """Test samples of a fleet, as one device sees them."""

    predicted: Labels
    labels: Labels
    is_own: Bools
    is_novel: Bools


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    size = draw(st.integers(0, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    held, held_by_fleet = rng.random(CLASSES) < 0.5, rng.random(CLASSES) < 0.8
    labels = rng.integers(0, CLASSES, size)
    predicted = np.where(rng.random(size) < 0.6, labels, rng.integers(0, CLASSES, size))
    return Fleet(predicted, labels, rng.random(size) < 0.4, novel_samples(labels, held, held_by_fleet | held))


def measure(fleet: Fleet) -> DeviceAccuracy:
    return device_accuracy(fleet.predicted, fleet.labels, fleet.is_own, fleet.is_novel)


def test_the_definitions_on_a_worked_example() -> None:
    labels = np.array([0, 0, 1, 2, 2, 3])
    predicted = np.array([0, 1, 1, 2, 0, 3])
    is_own = np.array([True, True, True, False, False, False])
    held = np.array([True, True, False, False])
    held_by_fleet = np.array([True, True, True, False])  # nobody trains on class 3
    is_novel = novel_samples(labels, held, held_by_fleet)
    assert is_novel.tolist() == [False, False, False, True, True, False]
    found = device_accuracy(predicted, labels, is_own, is_novel, shares=(0.0, 0.1))
    assert (found.own_count, found.fleet_count, found.novel_count) == (3, 6, 2)
    assert found.own == pytest.approx(2 / 3)
    assert found.fleet == pytest.approx(4 / 6)
    assert found.novel == pytest.approx(1 / 2)
    assert found.stream == {0.0: pytest.approx(2 / 3), 0.1: pytest.approx(0.9 * 2 / 3 + 0.1 / 2)}


@given(fleets())
def test_correct_predictions_are_1_and_wrong_ones_0(fleet: Fleet) -> None:
    for shift, expected in ((0, 1.0), (1, 0.0)):
        found = measure(replace(fleet, predicted=(fleet.labels + shift) % CLASSES))
        for value in (found.own, found.fleet, found.novel, *found.stream.values()):
            assert value is None or value == pytest.approx(expected)


@given(fleets(), st.integers(0, 1000))
def test_the_order_of_the_samples_does_not_matter(fleet: Fleet, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(fleet.labels))
    shuffled = Fleet(fleet.predicted[order], fleet.labels[order], fleet.is_own[order], fleet.is_novel[order])
    assert measure(shuffled) == measure(fleet)


@given(fleets())
def test_without_samples_an_accuracy_is_none(fleet: Fleet) -> None:
    found = measure(fleet)
    for value, count in ((found.own, found.own_count), (found.novel, found.novel_count)):
        assert (value is None) == (count == 0)
    nothing_novel = measure(replace(fleet, is_novel=np.zeros_like(fleet.is_novel)))
    assert nothing_novel.novel is None
    assert set(nothing_novel.stream) == ({0.0} if found.own_count else set())


@given(fleets())
def test_a_stream_lies_between_own_and_novel(fleet: Fleet) -> None:
    found = measure(fleet)
    if found.own is not None and found.novel is not None:
        assert set(found.stream) == set(SHARES)
        assert found.stream[0.0] == found.own
        for value in found.stream.values():
            assert min(found.own, found.novel) - 1e-9 <= value <= max(found.own, found.novel) + 1e-9


@given(fleets(), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.integers(0, 1000))
def test_a_drawn_stream_has_the_share_and_no_sample_twice(fleet: Fleet, share: float, seed: int) -> None:
    order = stream_order(fleet.is_own, fleet.is_novel, share, np.random.default_rng(seed))
    assert len(set(order.tolist())) == len(order)
    assert (fleet.is_own | fleet.is_novel)[order].all()
    novel = int((~fleet.is_own)[order].sum())
    assert abs(novel - share * len(order)) <= 1
    own_left, novel_left = fleet.is_own.sum() - (len(order) - novel), (fleet.is_novel & ~fleet.is_own).sum() - novel
    assert own_left == 0 or novel_left == 0  # one of them is used up


def test_a_drawn_stream_depends_on_its_seed_only() -> None:
    is_own, is_novel = np.arange(200) < 80, np.arange(200) >= 150
    first, again, other = (stream_order(is_own, is_novel, 0.1, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    mixed = (~is_own)[first]
    assert mixed[: len(mixed) // 2].any() and mixed[len(mixed) // 2 :].any()  # novel samples are not all at one end


@given(fleets(), st.integers(0, 1000))
def test_a_static_model_has_on_drawn_samples_the_accuracy_of_its_stream(fleet: Fleet, seed: int) -> None:
    """At share 0.5 with equally many samples of both kinds, the drawn stream holds all of them."""
    kinds = [np.flatnonzero(fleet.is_own), np.flatnonzero(fleet.is_novel & ~fleet.is_own)]
    kept = np.concatenate([kind[: min(map(len, kinds))] for kind in kinds])
    fleet = Fleet(fleet.predicted[kept], fleet.labels[kept], fleet.is_own[kept], ~fleet.is_own[kept])
    order = stream_order(fleet.is_own, fleet.is_novel, 0.5, np.random.default_rng(seed))
    correct = (fleet.predicted == fleet.labels)[order]
    found = stream_accuracy(correct, fleet.is_own[order], 0.5)
    assert found == (pytest.approx(measure(fleet).stream[0.5]) if len(kept) else None)


def test_a_model_that_adapts_gains_on_a_stream_of_novel_samples_and_loses_little_on_own_ones() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    held, prior = np.array([True, True, False, False]), np.array([0.49, 0.49, 0.01, 0.01], np.float32)
    logits = 3 * np.eye(4)[labels] + rng.normal(0, 1, (200, 4)) + np.log(prior)
    log_p = log_softmax(logits.astype(np.float32))
    is_own, is_novel = held[labels], ~held[labels]
    static = device_accuracy(log_p.argmax(axis=1), labels, is_own, is_novel).stream
    adapted = adapting_streams(log_p, labels, is_own, is_novel, prior, held, seed=0)
    assert set(adapted) == set(static) == set(SHARES)
    assert adapted[0.5] > static[0.5] + 0.1
    assert adapted[0.0] > static[0.0] - 0.05
    assert adapted == adapting_streams(log_p, labels, is_own, is_novel, prior, held, seed=0)


def test_a_model_does_not_adapt_to_a_few_samples_and_has_no_stream_without_novel_ones() -> None:
    labels = np.zeros(MIN_SAMPLES - 1, np.int64)
    held, prior = np.array([True, False]), np.array([0.5, 0.5], np.float32)
    log_p = np.log(np.tile(np.array([[0.4, 0.6]], np.float32), (len(labels), 1)))
    is_own = np.ones(len(labels), bool)
    assert adapting_streams(log_p, labels, is_own, ~is_own, prior, held, seed=0) == {0.0: 0.0}


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_harmonic_mean_is_near_the_lower_value(own: float, novel: float) -> None:
    found = harmonic_mean(own, novel)
    assert found is not None
    assert min(own, novel) - 1e-9 <= found <= min(max(own, novel), 2 * min(own, novel)) + 1e-9
    assert harmonic_mean(own, None) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_worst_decile_is_of_a_tenth_of_the_devices_and_at_least_one(own: list[float]) -> None:
    found, ranked = worst_decile(own), sorted(own)
    assert found is not None
    assert ranked[0] - 1e-9 <= found <= np.mean(own) + 1e-9
    if len(own) <= 10:
        assert found == ranked[0]
    assert worst_decile([]) is None


def test_devices_count_by_their_samples() -> None:
    small = DeviceAccuracy(1.0, 10, 0.5, 100, 0.0, 30, {0.0: 1.0, 0.1: 0.9})
    large = DeviceAccuracy(0.5, 90, 0.7, 100, None, 0, {0.0: 0.5})  # holds every class
    empty = DeviceAccuracy(None, 0, 0.6, 100, 0.2, 70, {})
    found = summarize([small, large, empty])
    assert found.own == pytest.approx(0.55)
    assert found.fleet == pytest.approx(0.6)
    assert found.novel == pytest.approx(0.14)
    assert found.stream == {0.0: pytest.approx(0.55), 0.1: pytest.approx(0.9)}
    assert found.harmonic == pytest.approx(2 * 0.55 * 0.14 / 0.69)
    assert found.worst_decile == 0.5


def test_without_devices_there_is_no_summary() -> None:
    found = summarize([])
    assert (found.own, found.fleet, found.novel, found.stream, found.harmonic, found.worst_decile) == (
        *(None, None, None),
        {},
        *(None, None),
    )


def test_wrong_shapes_and_shares_are_named() -> None:
    labels, bools = np.zeros(3, np.int64), np.ones(3, bool)
    with pytest.raises(ValueError, match=r"all must be \(n,\)"):
        device_accuracy(labels, labels, bools, bools[:2])
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        stream_order(bools, bools, 1.5, np.random.default_rng(0))
