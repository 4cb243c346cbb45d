"""The share of the processors that other processes use (ours)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

MIN_SECONDS = 0.5  # least processor time between two readings from which a share is computed
FAMILY_SECONDS = 30.0  # between two searches for child processes; a search reads every process of the machine


@dataclass(frozen=True)
class ProcessorTimes:
    """Seconds since the machine's start, summed over its processors: `total`, and those that `others` used."""

    total: float
    others: float


class ProcessorTimesReader:
    """Reads processor times with psutil. This process and its descendants do not count as others."""

    def __init__(self) -> None:
        self._family: list[psutil.Process] = []
        self._family_until = 0.0

    def __call__(self) -> ProcessorTimes | None:
        try:
            times = psutil.cpu_times()
            if time.monotonic() > self._family_until:
                own = psutil.Process()
                self._family = [own, *own.children(recursive=True)]
                self._family_until = time.monotonic() + FAMILY_SECONDS
        except (OSError, psutil.Error):
            return None
        total = sum(times[:8])  # the other fields are guest times, which user time includes
        idle = times.idle + getattr(times, "iowait", 0.0)
        return ProcessorTimes(total, total - idle - sum(map(_seconds, self._family)))


def _seconds(process: psutil.Process) -> float:
    """Processor time of a process and its ended children. 0 for an ended process: its parent's time includes it."""
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0


class OtherLoad:
    """The share of the processors that others used between the last two readings."""

    def __init__(self, read: Callable[[], ProcessorTimes | None] | None = None) -> None:
        self._read = read or ProcessorTimesReader()
        self._last: ProcessorTimes | None = None
        self._share: float | None = None

    def share(self) -> float | None:
        """None after the first reading, and if the times are unknown."""
        times = self._read()
        if times is None or self._last is None:
            self._last = times
            return None
        total, others = times.total - self._last.total, times.others - self._last.others
        if total >= MIN_SECONDS:
            self._last = times
            self._share = min(max(others / total, 0.0), 1.0)
        return self._share
