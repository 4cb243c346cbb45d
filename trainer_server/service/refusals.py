"""What does not count is counted: by who sent it and what kind of thing was wrong, so that nobody can fill a log."""

from __future__ import annotations

from collections import Counter

Who = tuple[str, str]  # device and kind


class Refusals:
    """Since they were stored last."""

    def __init__(self) -> None:
        self._counts: Counter[Who] = Counter()
        self._last: dict[Who, str] = {}
        self._known: set[Who] = set()

    def add(self, device: str, kind: str, text: str) -> bool:
        """True for the first of its kind."""
        who = (device, kind)
        self._counts[who] += 1
        self._last[who] = text
        first = who not in self._known
        self._known.add(who)
        return first

    def pending(self) -> dict[Who, tuple[int, str]]:
        """How many, and what was said of the last."""
        return {who: (count, self._last[who]) for who, count in self._counts.items()}

    def stored(self) -> None:
        self._counts.clear()
