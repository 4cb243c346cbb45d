"""Partitions of a data set among virtual devices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.trial.shares import LEAST, dirichlet_shares
from fedfmsl.algorithms.arrays import Labels
from fedfmsl.errors import ConfigError
from simulation.partition import (
    Partition,
    Scheme,
    apportion,
    by_classes,
    by_dirichlet,
    by_group,
    by_quantity,
    check_minimum,
    evenly,
)

Divide = Callable[[Labels, Labels, int, int], Partition]  # labels of training and test samples, devices, seed


def grouped(train: Labels, test: Labels, devices: int, seed: int) -> Partition:
    names = ["shop", "farm", "market"]
    groups = [[names[index % 3] for index in range(len(labels))] for labels in (train, test)]
    return by_group(train, test, groups[0], groups[1], devices, seed)


SCHEMES: dict[str, Divide] = {
    "dirichlet": lambda train, test, devices, seed: by_dirichlet(train, test, devices, 0.3, seed),
    "pathological": lambda train, test, devices, seed: by_classes(train, test, devices, 2, seed),
    "quantity": lambda train, test, devices, seed: by_quantity(train, test, devices, 0.5, seed),
    "natural": grouped,
    "iid": evenly,
}


def labels(counts: list[int], seed: int) -> Labels:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(3 * LEAST, 40), min_size=2, max_size=6),
    st.integers(0, 9),
    st.integers(1, 30),
    st.integers(0, 2**31),
)
def test_every_sample_is_on_one_device_and_a_seed_repeats(
    scheme: str, counts: list[int], tests: int, devices: int, seed: int
) -> None:
    divide = SCHEMES[scheme]
    train, test = labels(counts, seed), labels([tests] * len(counts), seed + 1)
    if scheme == "pathological":
        devices = max(devices, len(counts))  # otherwise some classes are on no device
    partition = divide(train, test, devices, seed)
    for parts, size in ((partition.train, len(train)), (partition.test, len(test))):
        assert len(parts) == devices
        assert sorted(index for own in parts for index in own) == list(range(size))
    again = divide(train, test, devices, seed)
    assert all(np.array_equal(one, two) for one, two in zip(partition.train, again.train, strict=True))
    assert all(np.array_equal(one, two) for one, two in zip(partition.test, again.test, strict=True))


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "natural"])
def test_a_device_has_no_single_training_sample_of_a_class(scheme: str) -> None:
    train, test = labels([37, 20, 11], 0), labels([9, 9, 9], 1)
    partition = SCHEMES[scheme](train, test, 12, 3)
    counts = partition.counts(train, 3)
    assert not (counts == 1).any()
    for own, tests in zip(partition.train, partition.test, strict=True):
        if scheme != "natural":
            assert set(test[tests]) <= set(train[own])


def test_dirichlet_shares_are_those_of_the_trial() -> None:
    train, test = labels([30, 25], 0), labels([8, 8], 1)
    partition = by_dirichlet(train, test, 4, 0.5, seed=7)
    own = np.flatnonzero(train == 1)
    tests = np.flatnonzero(test == 1)
    shares = dirichlet_shares(own.tolist(), tests.tolist(), 4, 0.5, np.random.default_rng([7, 1]))
    for device, share in enumerate(shares[0]):
        assert set(partition.train[device]) & set(own) == set(share)


def test_pathological_devices_have_that_many_classes_and_classes_equally_many_devices() -> None:
    train = labels([40] * 5, 0)
    held = by_classes(train, labels([4] * 5, 1), devices=10, classes_per_device=2, seed=0).counts(train, 5) > 0
    assert (held.sum(axis=1) == 2).all()
    assert (held.sum(axis=0) == 4).all()
    with pytest.raises(ConfigError, match="--classes-per-device 6 is more than 5"):
        by_classes(train, train, 10, 6, 0)


def test_iid_devices_differ_by_a_few_samples_even_if_classes_are_too_small_for_all() -> None:
    train = labels([50] * 10, 0)
    sizes = [len(own) for own in evenly(train, labels([5] * 10, 1), devices=100, seed=0).train]
    assert min(sizes) >= 4
    assert max(sizes) <= 6


def test_a_natural_partition_has_one_group_per_device_or_several_devices_per_group() -> None:
    train, test = labels([30, 30], 0), labels([6, 6], 1)
    train_groups = ["a" if index < 40 else "b" for index in range(60)]
    test_groups = ["b"] * 12
    four = by_group(train, test, train_groups, test_groups, 4, seed=0)
    groups = [{train_groups[index] for index in own} for own in four.train]
    assert groups == [{"a"}, {"b"}, {"a"}, {"b"}]
    assert [len(own) > 0 for own in four.test] == [False, True, False, True]
    one = by_group(train, test, train_groups, test_groups, 1, seed=0)
    assert len(one.train[0]) == 60
    with pytest.raises(ConfigError, match="--group-column"):
        by_group(train, test, [""] * 60, [""] * 12, 2, seed=0)


def test_devices_below_the_minimum_are_one_error() -> None:
    partition = Partition((np.array([0, 1]), np.array([2])), (np.array([]), np.array([])))
    check_minimum(partition, 1, Scheme.DIRICHLET)
    with pytest.raises(
        ConfigError, match=r"1 of 2 devices \(device-1\) would have fewer than 2 .*; use a larger --alpha"
    ):
        check_minimum(partition, 2, Scheme.DIRICHLET)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(any), st.integers(1, 50))
def test_apportioned_counts_sum_up_and_none_is_below_the_least(proportions: list[float], total: int) -> None:
    counts = apportion(np.array(proportions), total, np.arange(len(proportions)))
    assert counts.sum() == total
    assert total < LEAST or not ((counts > 0) & (counts < LEAST)).any()
    assert not counts[np.array(proportions) == 0].any()
