"""Counts refused messages by device and kind. Only the first of a kind is logged, so no device can fill a log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container

logger = logging.getLogger(__name__)

UNKNOWN_DEVICE = "unknown device"

Key = tuple[str, str]  # device and kind


class Refusals:
    """Refused messages that are not in the store yet. `total`: of all since the server's start, by kind."""

    def __init__(self, total: Counter[str]) -> None:
        self._total = total
        self._counts: Counter[Key] = Counter()
        self._last: dict[Key, str] = {}
        self._known: set[Key] = set()

    def refuse(self, device: str, devices: Container[str], kind: str, text: str) -> None:
        """Counts a refused message. All devices that are not among the `devices` of the run count as one."""
        sender = device if device in devices else UNKNOWN_DEVICE
        key = (sender, kind)
        self._total[kind] += 1
        self._counts[key] += 1
        self._last[key] = text
        if key not in self._known:
            self._known.add(key)
            logger.warning("refused from %s (%s): %s", sender, kind, text)

    def pending(self) -> dict[Key, tuple[int, str]]:
        """Count and latest text by key."""
        return {key: (count, self._last[key]) for key, count in self._counts.items()}

    def clear(self) -> None:
        """Forgets the pending counts, after they are stored."""
        self._counts.clear()
