"""The growing delays between the attempts of an operation that fails."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field


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


GAP = Backoff(
    first=10.0, longest=300.0, jitter=0.5
)  # without a further chunk of a blob, until missing ones are asked for


@dataclass(slots=True)
class Timeout:
    """Expires after each delay of `backoff` in which nothing restarts it."""

    backoff: Backoff
    name: str = ""  # for the jitter
    attempts: int = 0  # how often it has expired
    since: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        self.attempts, self.since = 0, time.monotonic()

    def expired(self) -> bool:
        """Whether a delay is over. If so, the next and longer one begins."""
        now = time.monotonic()
        if now < self.since + self.backoff.delay(self.attempts, self.name):
            return False
        self.attempts, self.since = self.attempts + 1, now
        return True
