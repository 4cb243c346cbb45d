"""Durations as texts."""

from __future__ import annotations

import pytest

from fedfmsl.common.duration import seconds_of
from fedfmsl.errors import ConfigError


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86_400), (" 90m ", 5_400), ("366d", 31_622_400)])
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "0h", "1.5h", "-1h", "24 hours", "10s"])
def test_other_texts_are_refused_with_what_may_be_written(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{text!r} is not a duration; write 24h, 90m or 7d$"):
        seconds_of(text)


@pytest.mark.parametrize("text", ["367d", "999999999d"])
def test_a_duration_is_a_year_at_most(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^'{text}' is longer than 366 days"):
        seconds_of(text)
