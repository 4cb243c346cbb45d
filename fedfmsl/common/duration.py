"""A duration as a text, like 24h."""

from __future__ import annotations

import re
from datetime import timedelta

from fedfmsl.errors import ConfigError

UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
LONGEST = timedelta(days=366)
_DURATION = re.compile(r"([0-9]{1,9})([mhd])")


def seconds_of(text: str) -> float:
    """The seconds of a duration. Raises ConfigError if the text is none, or if it is longer than LONGEST."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or not int(found[1]):
        raise ConfigError(f"{text!r} is not a duration; write 24h, 90m or 7d")
    duration = min(int(found[1]), LONGEST // UNITS[found[2]] + 1) * UNITS[found[2]]
    if duration > LONGEST:
        raise ConfigError(f"{text!r} is longer than {LONGEST.days} days; write a shorter duration")
    return duration.total_seconds()
