"""When a device may train: hours, limits, and what keeps it from going on for a moment only."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.resources.governor import Governor, Limits, Readings, pause_reason
from fedfmsl.common.hours import DAY, Hours

MONDAY = datetime(2026, 11, 23)


def test_a_changed_time_zone_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    hours = (Hours.parse("00:00-12:00"), Hours.parse("12:00-24:00"))
    governors = [Governor(Limits((each,)), Readings) for each in hours]

    def allowed() -> list[bool]:
        return [not governor.check() for governor in governors]

    monkeypatch.setenv("TZ", "UTC0")
    before = allowed()
    monkeypatch.setenv("TZ", "UTC-12")
    assert allowed() == before[::-1]
    monkeypatch.undo()
    allowed()  # for the other tests


LIMITS = Limits((Hours.parse("22:00-06:00"), Hours.parse("Sat 10:00-18:00")), 75.0, True, 0.5, False)
NIGHT, NOON = MONDAY + timedelta(hours=23), MONDAY + timedelta(hours=12)
FINE = Readings(temperature=60.0, on_battery=False, others=0.1, metered=False, throttled=False)


@pytest.mark.parametrize(
    ("readings", "now", "reason"),
    [
        (FINE, NIGHT, ""),
        (FINE, NOON, "outside of --hours 22:00-06:00, Sat 10:00-18:00"),
        (replace(FINE, temperature=81.5), NIGHT, "81.5 °C, above --max-temperature 75"),
        (replace(FINE, on_battery=True), NIGHT, "on battery, with --mains-only"),
        (replace(FINE, others=0.62), NIGHT, "other processes use 62% of the processors, above --max-load 0.5"),
        (replace(FINE, metered=True), NIGHT, "on a metered network, with --no-on-metered"),
        (replace(FINE, throttled=True), NIGHT, ""),
    ],
)
def test_each_limit_forbids_and_says_so(readings: Readings, now: datetime, reason: str) -> None:
    assert pause_reason(LIMITS, readings, now, paused=False) == reason
    assert pause_reason(Limits(), readings, now, paused=False) == ""


def test_a_pause_ends_only_when_it_is_clearly_cooler_and_quieter() -> None:
    warm, busy = replace(FINE, temperature=72.0), replace(FINE, others=0.45)
    assert pause_reason(LIMITS, warm, NIGHT, paused=False) == pause_reason(LIMITS, busy, NIGHT, paused=False) == ""
    assert pause_reason(LIMITS, warm, NIGHT, paused=True) == "72.0 °C, not yet 5 °C below --max-temperature 75"
    busy_still = "other processes use 45% of the processors, not yet below 80% of --max-load 0.5"
    assert pause_reason(LIMITS, busy, NIGHT, paused=True) == busy_still
    assert pause_reason(LIMITS, replace(FINE, temperature=70.0, others=0.4), NIGHT, paused=True) == ""


@given(
    temperature=st.none() | st.floats(-40, 150),
    others=st.none() | st.floats(0, 1),
    on_battery=st.none() | st.booleans(),
    metered=st.none() | st.booleans(),
    minute=st.integers(0, 7 * DAY - 1),
)
def test_a_device_that_may_resume_would_not_have_paused(
    temperature: float | None, others: float | None, on_battery: bool | None, metered: bool | None, minute: int
) -> None:
    readings, now = Readings(temperature, on_battery, others, metered), MONDAY + timedelta(minutes=minute)
    if not pause_reason(LIMITS, readings, now, paused=True):
        assert not pause_reason(LIMITS, readings, now, paused=False)
    unlimited_hours = replace(LIMITS, hours=())
    known = replace(readings, temperature=None, others=None, on_battery=None, metered=None)
    assert pause_reason(unlimited_hours, known, now, paused=True) == ""  # what is unknown forbids nothing
