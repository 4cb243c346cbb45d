"""Counts refused messages by device and kind. Only the first of a kind is logged, so no device can fill a log."""

from __future__ import annotations

from collections import Counter

Key = tuple[str, str]  # device and kind


class Refusals:
    """Refused messages that are not in the store yet."""

    def __init__(self) -> None:
        self._counts: Counter[Key] = Counter()
        self._last: dict[Key, str] = {}
        self._known: set[Key] = set()

    def add(self, device: str, kind: str, text: str) -> bool:
        """True for the first of its kind from this device."""
        key = (device, kind)
        self._counts[key] += 1
        self._last[key] = text
        first = key not in self._known
        self._known.add(key)
        return first

    def pending(self) -> dict[Key, tuple[int, str]]:
        """Count and latest text by key."""
        return {key: (count, self._last[key]) for key, count in self._counts.items()}

    def clear(self) -> None:
        """Forgets the pending counts, after they are stored."""
        self._counts.clear()
