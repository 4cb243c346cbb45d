"""Whether a device may train now, by its owner's limits, the sensors and the clock (ours).

`pause_reason` is a pure function; `Governor` applies it. An unknown reading never causes a pause.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from time import tzset
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
DAY, WEEK = 24 * 60, 7 * 24 * 60  # minutes
RESUME_MARGIN = 5.0  # °C below the limit: a device that paused for its temperature resumes there
RESUME_SHARE = 0.8  # of the load limit: a device that paused for the load of other processes resumes there

_DAY, _TIME = "|".join(DAYS), r"(?:[01]?\d|2[0-3]):[0-5]\d"
_WHEN = re.compile(rf"(?:({_DAY})(?:-({_DAY}))? )?({_TIME})-({_TIME}|24:00)")


@dataclass(frozen=True)
class Hours:
    """A time span that repeats, in the device's local time. `days`: the first and the last weekday on which it begins;
    0 is Monday. `begin` and `end`: minutes of the day. If `end` is not after `begin`, it is on the next day."""

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
        return cls(days, begin, end)

    def __contains__(self, now: datetime) -> bool:
        minute = now.weekday() * DAY + now.hour * 60 + now.minute
        first, last = self.days
        length = (self.end - self.begin) % DAY or DAY
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


@dataclass(frozen=True)
class Limits:
    """When the owner allows training. `max_temperature` in °C; `max_load` is the share of all processors that other
    processes may use. None and the defaults set no limit."""

    hours: tuple[Hours, ...] = ()
    max_temperature: float | None = None
    mains_only: bool = False
    max_load: float | None = None
    on_metered: bool = True


@dataclass(frozen=True)
class Readings:
    """Sensor values; None if unknown. `temperature` in °C; `others` is the share of all processors that other processes
    use."""

    temperature: float | None = None
    on_battery: bool | None = None
    others: float | None = None
    metered: bool | None = None
    throttled: bool | None = None


def pause_reason(limits: Limits, readings: Readings, now: datetime, paused: bool) -> str:
    """Why the device may not train, or "". A device that has `paused` resumes only at a lower temperature and load, so
    that it does not switch back and forth."""
    if limits.hours and not any(now in hours for hours in limits.hours):
        return f"outside of --hours {', '.join(map(str, limits.hours))}"
    celsius, margin = readings.temperature, RESUME_MARGIN if paused else 0.0
    if limits.max_temperature is not None and celsius is not None and celsius > limits.max_temperature - margin:
        above = "above" if celsius > limits.max_temperature else f"not yet {RESUME_MARGIN:g} °C below"
        return f"{celsius:.1f} °C, {above} --max-temperature {limits.max_temperature:g}"
    if limits.mains_only and readings.on_battery:
        return "on battery, with --mains-only"
    factor = RESUME_SHARE if paused else 1.0
    if limits.max_load is not None and readings.others is not None and readings.others > limits.max_load * factor:
        above = "above" if readings.others > limits.max_load else f"not yet below {RESUME_SHARE:.0%} of"
        return f"other processes use {readings.others:.0%} of the processors, {above} --max-load {limits.max_load:g}"
    if not limits.on_metered and readings.metered:
        return "on a metered network, with --no-on-metered"
    return ""


class Governor:
    """Reads the sensors and decides. `reason` is the result of the last check."""

    def __init__(self, limits: Limits, read: Callable[[], Readings]) -> None:
        self.reason = ""
        self._limits = limits
        self._read = read

    def check(self) -> str:
        """Reads the sensors. Returns why the device may not train now, or ""."""
        tzset()  # the time zone may have changed: localtime_r does not read it again
        self.reason = pause_reason(self._limits, self._read(), datetime.now(), paused=bool(self.reason))
        return self.reason
