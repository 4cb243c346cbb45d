"""The seeded model of participation."""

from __future__ import annotations

from collections import Counter

import pytest

from fedfmsl.algorithms.sal import AllAtOnce, Sal
from fedfmsl.protocol.messages import DeviceStatus
from simulation.participation import Participation, assign_level_caps
from trainer_server.config import RunConfig
from trainer_server.coordinator.selection import select_devices

SIZES = {f"device-{index}": 10 for index in range(50)}


def test_each_round_selects_another_share_and_a_seed_repeats() -> None:
    one, two = Participation(fraction=0.1, seed=1), Participation(fraction=0.1, seed=2)
    assert len(one.devices(SIZES, 0)) == 5
    assert one.devices(SIZES, 3) == one.devices(SIZES, 3)
    assert one.devices(SIZES, 3) != one.devices(SIZES, 4)
    assert one.devices(SIZES, 3) != two.devices(SIZES, 3)
    assert set(Participation().devices(SIZES, 0)) == set(SIZES)


@pytest.mark.parametrize(("count", "selected"), [(1000, 100), (6, 1), (25, 3), (1, 1)])
def test_a_tenth_is_rounded_up_as_the_server_does(count: int, selected: int) -> None:
    sizes = {f"device-{index}": 10 for index in range(count)}
    sal = Sal(AllAtOnce(), max_level=1)
    config = RunConfig(run="r", devices=count, select="random", fraction=0.1, stage1_sal=sal, stage2_sal=sal)
    ready = {name: DeviceStatus(device=name, online=True, bundle="0" * 64) for name in sizes}
    assert len(Participation(fraction=0.1).devices(sizes, 0)) == selected
    assert len(select_devices(config, ready, 1, 1, least=1)) == selected


def test_a_round_that_asks_all_devices_misses_those_that_fail() -> None:
    assert set(Participation(fraction=0.1).all_devices(SIZES, 0)) == set(SIZES)
    assert len(Participation(fraction=0.1, stragglers=0.3).all_devices(SIZES, 0)) == 35
    unreliable = Participation(dropout=0.5)
    assert unreliable.all_devices(SIZES, 0) != unreliable.devices(SIZES, 0) != unreliable.all_devices(SIZES, 1)


def test_dropouts_and_stragglers_are_missing_but_never_all_devices() -> None:
    counts = [len(Participation(dropout=0.5).devices(SIZES, index)) for index in range(40)]
    assert 20 < sum(counts) / len(counts) < 30
    assert len(Participation(stragglers=0.2).devices(SIZES, 0)) == 40
    assert len(Participation(fraction=0.02, dropout=1.0, stragglers=0.99).devices(SIZES, 0)) == 1


def test_stragglers_are_the_devices_with_many_samples_and_the_slow_ones() -> None:
    sizes = {name: 1000 if index < 10 else 10 for index, name in enumerate(SIZES)}
    participation = Participation(stragglers=0.3)
    arrived = participation.devices(sizes, 0)
    assert not {name for name, size in sizes.items() if size == 1000} & set(arrived)
    assert arrived == participation.devices(sizes, 1)  # speeds are constant


@pytest.mark.parametrize("caps", [(), (1,), (1, 2, 3)])
def test_level_caps_are_assigned_to_equally_many_devices(caps: tuple[int, ...]) -> None:
    assigned = assign_level_caps([*SIZES], caps, seed=0)
    assert Counter(assigned.values()).keys() == set(caps)
    assert max(Counter(assigned.values()).values(), default=0) <= 50 // max(len(caps), 1) + 1
    assert assigned == assign_level_caps([*SIZES], caps, seed=0)
