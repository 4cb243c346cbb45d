"""Time spans of the day and of the week, in the local time of the machine (ours).

They are compared with the wall clock. When that is put forward or back, for daylight saving or by hand, what it shows
afterwards counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY, WEEK = 24 * 60, 7 * 24 * 60  # minutes
MINUTE = 60.0  # seconds

_DAY, _TIME = "|".join(DAYS), r"(?:[01]?\d|2[0-3]):[0-5]\d"
_WHEN = re.compile(rf"(?:({_DAY})(?:-({_DAY}))? )?({_TIME})-({_TIME}|24:00)")


@dataclass(frozen=True)
class Hours:
    """A time span that repeats, in the local time of the machine. `days`: the first and the last weekday on which it
    begins; 0 is Monday. `begin` and `end`: minutes of the day. If `end` is before `begin`, it is on the next day."""

    days: tuple[int, int]
    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Hours:
        """Parses a span like 22:00-06:00 or Sat 10:00-18:00. Raises ValueError for any other text."""
        found = _WHEN.fullmatch(" ".join(text.split()))
        if found is None:
            raise ValueError(f"{text!r} is not a time span; write 22:00-06:00, Sat 10:00-18:00 or Mon-Fri 18:00-07:00")
        first, last, *times = found.groups()
        days = (DAYS.index(first), DAYS.index(last or first)) if first else (0, len(DAYS) - 1)
        begin, end = (60 * int(hour) + int(minute) for hour, _, minute in (time.partition(":") for time in times))
        if begin == end:
            raise ValueError(f"{text!r} begins when it ends; write 00:00-24:00 for whole days")
        return cls(days, begin, end)

    def __contains__(self, now: datetime) -> bool:
        minute = now.weekday() * DAY + now.hour * 60 + now.minute
        first, last = self.days
        length = (self.end - self.begin) % DAY or DAY  # 00:00-24:00 has a day
        begins = (DAY * (first + day) + self.begin for day in range((last - first) % len(DAYS) + 1))
        return any((minute - begin) % WEEK < length for begin in begins)

    def __str__(self) -> str:
        first, last = (DAYS[day] for day in self.days)
        days = "" if self.days == (0, len(DAYS) - 1) else f"{first} " if first == last else f"{first}-{last} "
        begin, end = (f"{time // 60:02}:{time % 60:02}" for time in (self.begin, self.end))
        return f"{days}{begin}-{end}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Pydantic models parse this type from a string."""
        return core_schema.no_info_plain_validator_function(
            lambda value: cls.parse(str(value)), serialization=core_schema.to_string_ser_schema()
        )


def next_within(spans: Sequence[Hours], moment: float) -> float:
    """The first moment from `moment` on (unix seconds) that is within one of the spans: `moment` itself, or the begin
    of a minute. Infinite if there is none.

    It asks the local time of every minute, so that it is right also where the clock is put forward or back. A span may
    be skipped then, but not in the week after.
    """
    if any(datetime.fromtimestamp(moment) in span for span in spans):
        return moment
    begin = math.floor(moment / MINUTE) * MINUTE
    minutes = (begin + MINUTE * number for number in range(1, 2 * WEEK))
    return next((at for at in minutes if any(datetime.fromtimestamp(at) in span for span in spans)), math.inf)
