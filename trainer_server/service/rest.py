"""When a run rests: outside of the hours of --schedule (ours).

Only the I/O loop asks the clock on the wall. The log has when a rest begins and ends (`RestChanged`), so a replay needs
no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from time import tzset

from fedfmsl.common.hours import MINUTE, Hours, next_within


def rest_until(schedule: Sequence[Hours], now: float) -> float | None:
    """Until when the run rests, in unix seconds; None if it does not rest at `now`. No hours: it never rests."""
    until = _next_minute(tuple(schedule), math.floor(now / MINUTE)) if schedule else now
    return until if until > now else None


def describe(schedule: Sequence[Hours], until: float) -> str:
    """Until when the run rests, and why. For people, in local time."""
    if math.isinf(until):
        return f"outside of --schedule {written(schedule)}"
    when = datetime.fromtimestamp(until).isoformat(" ", "minutes")
    return f"until {when}, outside of --schedule {written(schedule)}"


def written(schedule: Sequence[Hours]) -> str:
    return ",".join(map(str, schedule))


@lru_cache(maxsize=1)  # the loop asks many times a minute
def _next_minute(schedule: tuple[Hours, ...], minute: int) -> float:
    tzset()  # the time zone may have changed
    return next_within(schedule, minute * MINUTE)
