"""An immutable map of which a changed copy is cheap (ours).

With ten thousand items a copy of a dict for each change would cost more than all else that the change needs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any, ParamSpec, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
R = TypeVar("R")
P = ParamSpec("P")
BUCKETS = 256  # a changed copy copies the list of buckets and one of them


class PersistentMap(Mapping[K, V]):
    """In no particular order."""

    __slots__ = ("_buckets", "_count")

    def __init__(self, items: Mapping[K, V] | None = None) -> None:
        buckets: list[dict[K, V]] = [{} for _ in range(BUCKETS)] if items else [{}] * BUCKETS
        for key, value in (items or {}).items():
            buckets[hash(key) % BUCKETS][key] = value
        self._buckets, self._count = buckets, len(items or ())

    def with_item(self, key: K, value: V) -> PersistentMap[K, V]:
        """This map with a new or another value of `key`."""
        changed: PersistentMap[K, V] = PersistentMap.__new__(PersistentMap)
        before = self._bucket(key)
        changed._buckets = self._buckets.copy()
        changed._buckets[hash(key) % BUCKETS] = {**before, key: value}
        changed._count = self._count + (key not in before)
        return changed

    def _bucket(self, key: object) -> dict[K, V]:
        return self._buckets[hash(key) % BUCKETS]

    def __getitem__(self, key: K) -> V:
        return self._bucket(key)[key]

    def __contains__(self, key: object) -> bool:
        return key in self._bucket(key)

    def __iter__(self) -> Iterator[K]:
        for bucket in self._buckets:
            yield from bucket

    def items(self) -> ItemsView[K, V]:
        return _Items(self)

    def values(self) -> ValuesView[V]:
        return _Values(self)

    def __len__(self) -> int:
        return self._count


class _Items(ItemsView[K, V]):
    """Those of the buckets, without a look for each key."""

    _mapping: PersistentMap[K, V]

    def __iter__(self) -> Iterator[tuple[K, V]]:
        for bucket in self._mapping._buckets:
            yield from bucket.items()


class _Values(ValuesView[V]):
    _mapping: PersistentMap[Any, V]

    def __iter__(self) -> Iterator[V]:
        for bucket in self._mapping._buckets:
            yield from bucket.values()


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """A function of large immutable values that keeps its latest result, for calls with the same objects in the same
    positions. For any thread."""
    latest: tuple[tuple[Any, ...], R] | None = None

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal latest
        kept = latest  # another thread may replace it meanwhile
        if kept is not None and not kwargs and len(args) == len(kept[0]) and all(map(_is, args, kept[0])):
            return kept[1]
        result = function(*args, **kwargs)
        if not kwargs:
            latest = args, result
        return result

    return call


def _is(one: object, other: object) -> bool:
    return one is other
