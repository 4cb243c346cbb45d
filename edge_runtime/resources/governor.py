"""Whether a device may train now, by its owner's limits, the sensors and the clock (ours).

`pause_reason` is a pure function; `Governor` applies it. An unknown reading never causes a pause.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from time import tzset

from fedfmsl.common.hours import Hours

RESUME_MARGIN = 5.0  # °C below the limit: a device that paused for its temperature resumes there
RESUME_SHARE = 0.8  # of the load limit: a device that paused for the load of other processes resumes there


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
