"""Tests of `fedfmsl.common.persistent_map`."""

from __future__ import annotations

import operator

import numpy as np
import pytest

from fedfmsl.common import persistent_map
from fedfmsl.common.persistent_map import PersistentMap, remembered


def test_each_version_keeps_its_items() -> None:
    rng, expected = np.random.default_rng(0), {}
    versions: list[tuple[PersistentMap[int, int], dict[int, int]]] = [(PersistentMap(), {})]
    for value, key in enumerate(map(int, rng.integers(0, 700, 1500))):
        expected = {**expected, key: value}
        versions.append((versions[-1][0].with_item(key, value), expected))
    for found, items in versions[::50]:
        assert (dict(found), len(found), found) == (items, len(items), PersistentMap(items))
        assert all(key in found and found[key] == value for key, value in items.items())
    latest = versions[-1][0]
    assert (-1 in latest, latest.get(-1)) == (False, None)
    with pytest.raises(KeyError):
        latest[-1]


def test_a_remembered_function_sees_other_objects_but_not_the_same_ones() -> None:
    seen: list[object] = []

    @remembered
    def count(items: list[int], more: int) -> int:
        seen.append(items)
        return len(items) + more

    first, second = [1], [1]
    assert [count(first, 0), count(first, 0), count(second, 0), count(first, 1)] == [1, 1, 1, 2]
    assert len(seen) == 3
    assert [count(first, more=1), count(first, more=2)] == [2, 3]


def test_a_remembered_function_is_for_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics look at a state while the server's loop goes on to the next one."""

    @remembered
    def copied(items: tuple[int, ...]) -> list[int]:
        return list(items)

    def interrupted(one: object, other: object) -> bool:
        monkeypatch.setattr(persistent_map, "_is", operator.is_)
        assert copied(second) == [2]  # another thread
        return one is other

    first, second = (1,), (2,)
    copied(first)
    monkeypatch.setattr(persistent_map, "_is", interrupted)
    assert copied(first) == [1]
