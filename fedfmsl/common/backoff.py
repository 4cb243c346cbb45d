"""The growing delays between the attempts of an operation that fails."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """`first` seconds, then `factor` times as long each time, at most `longest` seconds. Each delay is longer by a
    random share of at most `jitter`, so that many clients do not retry at the same moment."""

    first: float
    longest: float
    factor: float = 2.0
    jitter: float = 0.0

    def delay(self, attempt: int, name: str = "") -> float:
        """Seconds after the failed attempt `attempt` (from 0). The jitter depends on `name` and `attempt` alone."""
        seconds = min(self.first * self.factor ** min(attempt, 64), self.longest)
        return seconds * (1 + self.jitter * random.Random(f"{name} {attempt}").random())
