"""Time spans of the day and of the week, on the wall clock."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from time import tzset

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fedfmsl.common.hours import DAY, DAYS, Hours, next_within
from trainer_server.coordinator.limits import Limits
from trainer_server.service.rest import describe, rest_until

LIMITS = Limits(round_timeout=1, min_updates=1, max_repeats=None, enough=1)
MONDAY = datetime(2026, 11, 23)
MINUTES = st.integers(0, DAY - 1)
HOURS = st.builds(Hours, st.tuples(st.integers(0, 6), st.integers(0, 6)), MINUTES, st.integers(0, DAY)).filter(
    lambda hours: hours.begin != hours.end
)


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
        ("00:00-24:00", ["Mon 00:00", "Mon 08:00", "Sun 23:59"], []),
    ],
)
def test_hours_begin_on_their_days_and_may_end_on_the_next(hours: str, within: list[str], without: list[str]) -> None:
    found = Hours.parse(hours)
    assert [text for text in (*within, *without) if at(text) in found] == within


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


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    tzset()
    yield
    monkeypatch.undo()
    tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("hours", "now", "begin"),
    [
        ("22:00-06:00", "2026-11-27T21:59:30+01:00", "2026-11-27T22:00:00+01:00"),
        ("22:00-06:00", "2026-11-27T23:10:07+01:00", None),
        ("22:00-06:00", "2026-11-28T00:00:00+01:00", None),  # over midnight
        ("22:00-06:00", "2026-11-28T06:00:00+01:00", "2026-11-28T22:00:00+01:00"),
        ("22:00-06:00,12:00-13:00", "2026-11-28T06:00:00+01:00", "2026-11-28T12:00:00+01:00"),
        ("Sat 10:00-18:00", "2026-11-28T18:00:00+01:00", "2026-12-05T10:00:00+01:00"),
        # in spring 02:00 is 03:00 at once, in autumn 03:00 is 02:00 once
        ("22:00-06:00", "2026-03-28T12:00:00+01:00", "2026-03-28T22:00:00+01:00"),
        ("04:00-05:00", "2026-03-29T00:00:00+01:00", "2026-03-29T04:00:00+02:00"),
        ("02:30-06:00", "2026-03-29T00:00:00+01:00", "2026-03-29T03:00:00+02:00"),
        ("02:15-02:45", "2026-03-29T00:00:00+01:00", "2026-03-30T02:15:00+02:00"),
        ("Sun 02:15-02:45", "2026-03-29T00:00:00+01:00", "2026-04-05T02:15:00+02:00"),
        ("22:00-02:30", "2026-10-25T02:40:00+02:00", "2026-10-25T02:00:00+01:00"),
        ("22:00-02:30", "2026-10-25T02:10:00+01:00", None),
        ("22:00-02:30", "2026-10-25T02:40:00+01:00", "2026-10-25T22:00:00+01:00"),
    ],
)
def test_a_run_rests_until_the_clock_on_the_wall_shows_its_hours(hours: str, now: str, begin: str | None) -> None:
    spans = tuple(map(Hours.parse, hours.split(",")))
    limits = LIMITS.model_copy(update={"schedule": spans})
    moment = datetime.fromisoformat(now).timestamp()
    expected = None if begin is None else datetime.fromisoformat(begin).timestamp()
    assert rest_until(spans, moment) == expected
    assert next_within(spans, moment) == (moment if expected is None else expected)
    if expected is not None:
        when = datetime.fromtimestamp(expected)
        assert describe(limits, expected) == f"until {when:%Y-%m-%d %H:%M} (--schedule {hours})"
        assert rest_until(spans, expected) is None
        assert rest_until(spans, moment) == expected  # the clock was set back


def test_without_hours_a_run_rests_only_before_every_is_over() -> None:
    assert rest_until((), 100.0) is None
    assert rest_until((), 100.0, due=100.0) is None
    assert rest_until((), 100.0, due=110.5) == 110.5


@pytest.mark.usefixtures("berlin")
def test_every_may_end_outside_of_the_hours() -> None:
    limits = LIMITS.model_copy(update={"schedule": (Hours.parse("22:00-06:00"),), "every": "24h"})
    now, due, at_night = (datetime(2026, 11, 27, hour, 30).timestamp() for hour in (2, 7, 4))
    evening = datetime(2026, 11, 27, 22).timestamp()
    assert rest_until(limits.schedule, now, due) == evening
    assert rest_until(limits.schedule, now, at_night) == at_night
    assert describe(limits, evening, due) == "until 2026-11-27 22:00 (--schedule 22:00-06:00, --every 24h)"
