"""The delays between attempts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedfmsl.common.backoff import Backoff


def test_delays_double_up_to_the_longest() -> None:
    assert [Backoff(first=1.0, longest=6.0).delay(attempt) for attempt in range(5)] == [1.0, 2.0, 4.0, 6.0, 6.0]
    assert Backoff(first=1.0, longest=60.0).delay(10**9) == 60.0
    assert Backoff(first=1.0, longest=60.0, factor=3.0).delay(2) == 9.0


@given(st.integers(0, 20), st.text(max_size=8))
def test_jitter_only_lengthens_a_delay_and_is_the_same_for_a_name(attempt: int, name: str) -> None:
    plain, jittered = Backoff(30.0, 300.0), Backoff(30.0, 300.0, jitter=0.5)
    assert plain.delay(attempt) <= jittered.delay(attempt, name) <= 1.5 * plain.delay(attempt)
    assert jittered.delay(attempt, name) == jittered.delay(attempt, name)


def test_jitter_differs_between_names() -> None:
    assert len({Backoff(30.0, 300.0, jitter=0.5).delay(0, f"device-{n}") for n in range(100)}) == 100
