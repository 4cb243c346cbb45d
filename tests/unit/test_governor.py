"""When a device may train: hours, limits, and what keeps it from going on for a moment only."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from edge_runtime.resources.governor import DAY, DAYS, Governor, Hours, Limits, Readings, pause_reason

MONDAY = datetime(2026, 11, 23)
MINUTES = st.integers(0, DAY - 1)
HOURS = st.builds(Hours, st.tuples(st.integers(0, 6), st.integers(0, 6)), MINUTES, st.integers(0, DAY))


class Config(BaseModel):
    hours: tuple[Hours, ...]


def at(text: str) -> datetime:
    """Like "Tue 12:30", in a week of November 2026."""
    day, time = text.split()
    hour, minute = time.split(":")
    return MONDAY + timedelta(days=DAYS.index(day), hours=int(hour), minutes=int(minute))


@pytest.mark.parametrize(
    ("hours", "within", "without"),
    [
        ("22:00-06:00", ["Mon 22:00", "Tue 05:59", "Sun 23:00", "Mon 03:00"], ["Mon 21:59", "Tue 06:00", "Sat 12:00"]),
        ("Sat 10:00-18:00", ["Sat 10:00", "Sat 17:59"], ["Sat 09:59", "Sat 18:00", "Fri 12:00", "Sun 12:00"]),
        ("Mon-Fri 18:00-07:00", ["Mon 18:00", "Sat 06:59"], ["Mon 06:59", "Sat 18:00", "Sun 23:00", "Fri 12:00"]),
        ("Sat-Mon 00:00-24:00", ["Sat 00:00", "Sun 12:00", "Mon 23:59"], ["Fri 23:59", "Tue 00:00"]),
        ("Sun 23:00-01:00", ["Sun 23:30", "Mon 00:30"], ["Mon 23:30", "Sun 00:30"]),
        ("8:00-8:00", ["Mon 07:59", "Mon 08:00", "Sun 20:00"], []),
    ],
)
def test_hours_begin_on_their_days_and_may_end_on_the_next(hours: str, within: list[str], without: list[str]) -> None:
    found = Hours.parse(hours)
    assert [text for text in (*within, *without) if at(text) in found] == within


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


@given(HOURS)
def test_hours_are_written_as_they_are_read(hours: Hours) -> None:
    assert Hours.parse(str(hours)) == hours
    assert Config.model_validate_json(Config(hours=(hours,)).model_dump_json()).hours == (hours,)


@given(hours=HOURS, minute=st.integers(0, 7 * DAY - 1))
def test_hours_agree_with_going_through_the_days_one_by_one(hours: Hours, minute: int) -> None:
    now = MONDAY + timedelta(minutes=minute)
    first, last = hours.days
    days = {*range(first, last + 1)} if first <= last else {*range(first, 7), *range(last + 1)}
    length = timedelta(minutes=hours.end - hours.begin if hours.end > hours.begin else hours.end - hours.begin + DAY)
    begins = [MONDAY + timedelta(days=day, minutes=hours.begin) for day in range(-7, 7) if day % 7 in days]
    assert (now in hours) == any(begin <= now < begin + length for begin in begins)


@pytest.mark.parametrize(
    "text", ["", "22-6", "25:00-06:00", "24:00-06:00", "22:60-06:00", "mon 10:00-11:00", "Sat 10:00", "-Sat 1:00-2:00"]
)
def test_what_are_no_hours_is_refused_with_what_may_be_written(text: str) -> None:
    with pytest.raises(ValidationError, match="write 22:00-06:00, Sat 10:00-18:00 or Mon-Fri 18:00-07:00") as refused:
        Config.model_validate({"hours": [text]})
    assert refused.value.error_count() == 1


LIMITS = Limits((Hours.parse("22:00-06:00"), Hours.parse("Sat 10:00-18:00")), 75.0, True, 0.5, False)
NIGHT = at("Tue 23:00")
FINE = Readings(temperature=60.0, on_battery=False, others=0.1, metered=False, throttled=False)


@pytest.mark.parametrize(
    ("readings", "now", "reason"),
    [
        (FINE, NIGHT, ""),
        (FINE, at("Tue 12:00"), "outside of --hours 22:00-06:00, Sat 10:00-18:00"),
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
