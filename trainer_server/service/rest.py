"""When a run rests: outside of the hours of --schedule, before --every is over, and while a standing run has no news
(ours).

Only the I/O loop asks the wall clock. The log has when a rest begins and ends (`RestChanged`), so a replay needs no
clock.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from time import tzset

from fedfmsl.common.hours import MINUTE, Hours, next_within
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.state import State

logger = logging.getLogger(__name__)


class Rest:
    """`text`: until when the run rests, and why; "" if it does not. For people, in local time."""

    def __init__(self, wall: Callable[[], float]) -> None:
        """`wall`: the wall clock, in unix seconds."""
        self.text = ""
        self._reason = ""
        self._wall = wall

    def look(self, state: State) -> bool:
        """Whether the run rests now by the clock. Logs what has changed, also whether it waits for news."""
        now, opens = self._wall(), state.announced is None
        due = state.standing.due(state.limits, now) if opens else 0.0
        until = rest_until(state.limits.schedule, now, due)
        needs = opens and state.standing.needs_news
        lacks = state.standing.lacks(state.limits, map(state.devices.__getitem__, state.ready)) if needs else ""
        self.text = lacks if until is None else describe(state.limits, until, due)
        reason = "clock" if until is not None else "news" if lacks else ""
        if reason != self._reason:
            self._reason = reason
            logger.info("the run rests: %s", self.text) if self.text else logger.info("the run rests no more")
        return until is not None


def rest_until(schedule: Sequence[Hours], now: float, due: float = 0.0) -> float | None:
    """Until when the run rests, in unix seconds; None if it does not rest at `now`. No hours: it rests only before
    `due`."""
    earliest = max(now, due)
    until = max(_next_minute(tuple(schedule), math.floor(earliest / MINUTE)), earliest) if schedule else earliest
    return until if until > now else None


def describe(limits: Limits, until: float, due: float = 0.0) -> str:
    """Until when a run with these limits rests, and why."""
    options = [f"--schedule {','.join(map(str, limits.schedule))}"] if limits.schedule else []
    options += [f"--every {limits.every}"] if due else []
    when = "" if math.isinf(until) else f"until {datetime.fromtimestamp(until).isoformat(' ', 'minutes')} "
    return f"{when}({', '.join(options)})"


@lru_cache(maxsize=1)  # the loop asks many times a minute
def _next_minute(schedule: tuple[Hours, ...], minute: int) -> float:
    tzset()  # the time zone may have changed
    return next_within(schedule, minute * MINUTE)
