"""Secure aggregation: the sum is exact with any devices lost down to the threshold, and nothing else is learnt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.secure_aggregation import measure
from fedfmsl.algorithms import secure_aggregation as sa
from fedfmsl.algorithms.fixed_point import FRACTION_BITS, LARGEST, Words, fixed_point, numbers
from fedfmsl.algorithms.secure_aggregation import Roster, Secrets, SecureAggregationError


@dataclass
class Execution:
    """The devices of one execution, after their shares have been exchanged."""

    secrets: list[Secrets]
    roster: Roster
    shares: dict[int, sa.Bytes]

    @classmethod
    def of(cls, devices: int) -> Execution:
        secrets = [Secrets(bytes([u]) * 32) for u in range(devices)]
        names = [f"device-{u:04}" for u in range(devices)]
        roster = Roster(names, np.stack([each.public_keys for each in secrets]), b"session")
        shares = {u: each.encrypted_shares(roster, u) for u, each in enumerate(secrets)}
        return cls(secrets, roster, shares)

    def masked(self, device: int, members: set[int], values: np.ndarray, index: int = 0) -> Words:
        return self.secrets[device].mask(self.roster, device, index, members, fixed_point(values))

    def opened(self, device: int, members: set[int], survivors: set[int], index: int = 0) -> sa.Bytes:
        return self.secrets[device].open_shares(self.roster, device, index, members, survivors, self.shares)

    def total(self, members: set[int], survivors: set[int], answering: set[int], values: np.ndarray) -> Words:
        masked = sum((self.masked(u, members, values[u]) for u in survivors), np.zeros(values.shape[1], np.uint64))
        opened = {u: self.opened(u, members, survivors) for u in answering}
        return sa.unmask(self.roster, 0, members, survivors, masked, opened)


@pytest.fixture(scope="module")
def six() -> Execution:
    return Execution.of(6)


VALUES = np.random.default_rng(0).normal(0, 100, (64, 5))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_sum_is_exact_with_devices_lost_at_every_step(six: Execution, data: st.DataObject) -> None:
    """Of six devices, five shares recover a seed: one may be lost before, and one after it has sent its vector."""
    members = set(range(6)) - data.draw(st.sets(st.integers(0, 5), max_size=1))
    survivors = members - data.draw(st.sets(st.sampled_from(sorted(members)), max_size=1))
    answering = set(data.draw(st.permutations(sorted(survivors)))[: data.draw(st.integers(3, len(survivors)))])
    expected = sum((fixed_point(VALUES[u]) for u in survivors), np.zeros(5, np.uint64))
    if six.roster.enough(answering, members):
        total = six.total(members, survivors, answering, VALUES)
        assert np.array_equal(total, expected)
        assert np.allclose(numbers(total), VALUES[sorted(survivors)].sum(axis=0), atol=6 * 2.0**-FRACTION_BITS)
    else:
        with pytest.raises(SecureAggregationError, match=r"shares of device-000\d, fewer than 5"):
            six.total(members, survivors, answering, VALUES)


def test_the_neighbour_graph_of_many_devices_is_mutual_and_its_sum_is_exact() -> None:
    many = Execution.of(40)
    roster, members = many.roster, set(range(40)) - {3, 39}
    assert all(len(roster.holders(u)) == sa.NEIGHBOURS + 1 and u in roster.holders(u) for u in range(40))
    assert all(u in roster.holders(v) for u in range(40) for v in roster.holders(u))
    survivors = members - {0, 17}
    expected = sum((fixed_point(VALUES[u]) for u in survivors), np.zeros(5, np.uint64))
    assert np.array_equal(many.total(members, survivors, survivors - {1, 20}, VALUES), expected)


def test_a_masked_vector_is_uniform_whatever_it_holds(six: Execution) -> None:
    words = six.masked(0, set(range(6)), np.zeros(20_000))
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 0.02  # 5.6 standard deviations
    assert not np.array_equal(words, six.masked(0, set(range(6)), np.zeros(20_000), index=1))


def test_the_masks_of_one_device_hide_its_vector_from_all_others_together(six: Execution) -> None:
    """The self mask remains if every pairwise mask is known, as those of a device that is reported as lost."""
    everybody = set(range(6))
    masked = six.masked(0, everybody, VALUES[0])
    opened = {u: six.opened(u, everybody, everybody - {0}) for u in range(1, 6)}
    rest = sa.unmask(six.roster, 0, everybody, everybody - {0}, masked, opened)
    assert not np.array_equal(rest, fixed_point(VALUES[0]))


def test_shares_are_only_for_their_holder_and_roster(six: Execution) -> None:
    everybody = set(range(6))
    damaged = {**six.shares, 2: six.shares[2].copy()}
    damaged[2][1, 40] ^= 1
    for shares, roster in ((damaged, six.roster), (six.shares, Roster(six.roster.names, six.roster.keys, b"other"))):
        opened = six.secrets[1].open_shares(roster, 1, 0, everybody, everybody, shares)
        assert not opened[2].any() and opened[3].any() == (shares is damaged)


def test_a_device_whose_shares_are_damaged_is_in_a_sum_only_if_enough_others_hold_it(six: Execution) -> None:
    everybody, masked = set(range(6)), six.masked(0, set(range(6)), VALUES[0])
    for u in range(1, 6):
        masked = masked + six.masked(u, everybody, VALUES[u])
    opened = {u: six.opened(u, everybody, everybody).copy() for u in range(6)}
    opened[0][2] = 0
    expected = sum((fixed_point(VALUES[u]) for u in range(6)), np.zeros(5, np.uint64))
    assert np.array_equal(sa.unmask(six.roster, 0, everybody, everybody, masked, opened), expected)
    opened[1][2] = 0
    with pytest.raises(SecureAggregationError, match="4 shares of device-0002, fewer than 5"):
        sa.unmask(six.roster, 0, everybody, everybody, masked, opened)


def test_shares_that_recover_another_key_are_refused(six: Execution) -> None:
    everybody, survivors = set(range(6)), set(range(1, 6))
    opened = {u: six.opened(u, everybody, survivors).copy() for u in survivors}
    opened[3][0, 0] ^= 1
    with pytest.raises(SecureAggregationError, match="the shares of device-0000 do not recover its key"):
        sa.unmask(six.roster, 0, everybody, survivors, np.zeros(5, np.uint64), opened)


@pytest.mark.parametrize("survivors", [{0, 1}, {1, 2, 3}, {0, 1, 2, 7}])
def test_impossible_survivors_are_refused(six: Execution, survivors: set[int]) -> None:
    with pytest.raises(SecureAggregationError, match="survivors"):
        six.opened(0, set(range(6)), survivors)


@pytest.mark.parametrize(("names", "error"), [(["a", "b"], "fewer than 3"), (["a", "a", "b"], "in order")])
def test_a_roster_is_checked(names: list[str], error: str) -> None:
    with pytest.raises(SecureAggregationError, match=error):
        Roster(names, np.zeros((len(names), 1 + sa.VECTORS, sa.KEY_BYTES), np.uint8), b"")


def test_a_public_key_of_small_order_is_refused(six: Execution) -> None:
    keys = six.roster.keys.copy()
    keys[1] = 0
    with pytest.raises(SecureAggregationError, match="a public key is invalid"):
        six.secrets[0].encrypted_shares(Roster(six.roster.names, keys, b""), 0)


def test_encoded_sums_do_not_wrap_and_other_values_are_refused() -> None:
    extremes = np.array([LARGEST, -LARGEST])
    total = np.zeros(2, np.uint64)
    for _ in range(2500):  # the most devices of a run
        total += fixed_point(extremes)
    assert np.array_equal(numbers(total), 2500 * extremes)
    for value in (2 * LARGEST, np.inf, np.nan):
        with pytest.raises(ValueError, match="too large"):
            fixed_point(np.array([value]))


def test_the_benchmark_measures_both_sides() -> None:
    costs = measure(5, 64)
    assert costs.plain < costs.sent and costs.received > 0
