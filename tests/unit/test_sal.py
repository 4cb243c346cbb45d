"""SAL: when more blocks are activated."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfmsl.algorithms.sal import AllAtOnce, CapabilityQueue, FixedSchedule, Sal

RULES = st.builds(
    Sal,
    trigger=st.one_of(
        st.builds(CapabilityQueue, window=st.integers(2, 5), min_gain=st.floats(0, 0.5)),
        st.builds(FixedSchedule, window=st.integers(2, 5)),
        st.just(AllAtOnce()),
    ),
    max_level=st.integers(1, 12),
    step=st.integers(1, 4),
)


def levels(sal: Sal, accuracies: list[float]) -> list[int]:
    state, seen = sal.start(), []
    for accuracy in accuracies:
        state = sal.observe(state, accuracy)
        seen.append(state.level)
    return seen


@given(RULES, st.lists(st.floats(0, 1), max_size=40))
def test_levels_grow_by_steps_at_most_once_per_window_up_to_the_highest(sal: Sal, accuracies: list[float]) -> None:
    seen = [sal.start().level, *levels(sal, accuracies)]
    growth = [after - before for before, after in itertools.pairwise(seen)]
    assert all(
        step in (0, sal.step) or (step > 0 and after == sal.max_level)
        for step, after in zip(growth, seen[1:], strict=True)
    )
    assert max(seen) <= sal.max_level
    grown = [-1, *(index for index, step in enumerate(growth) if step)]
    assert all(later - earlier >= sal.trigger.window for earlier, later in itertools.pairwise(grown))


@pytest.mark.parametrize(
    ("accuracies", "level"),
    [
        ([0.5, 0.5], 1),  # the queue is not full
        ([0.5, 0.5, 0.5], 2),  # full, no gain
        ([0.5, 0.509, 0.4], 2),  # the best gains less than 2 %
        ([0.5, 0.52, 0.4], 1),  # more than 2 %, though the last is low
        ([0.5, 0.6, 0.7, 0.7, 0.7], 2),  # the queue slides until there is no gain
        ([0.5] * 5, 2),  # a higher level empties the queue
        ([0.5] * 6, 3),
        ([0.5] * 60, 4),
    ],
)
def test_the_capability_queue_triggers_on_a_plateau(accuracies: list[float], level: int) -> None:
    sal = Sal(CapabilityQueue(3, 0.02), max_level=4)
    assert levels(sal, accuracies)[-1] == level


@given(st.lists(st.floats(0, 1), min_size=7, max_size=7))
def test_a_fixed_schedule_and_all_at_once_do_not_depend_on_accuracies(accuracies: list[float]) -> None:
    assert levels(Sal(FixedSchedule(3), max_level=9, step=2), accuracies) == [1, 1, 3, 3, 3, 5, 5]
    assert levels(Sal(AllAtOnce(), max_level=9, step=2), accuracies) == [9] * 7


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CapabilityQueue(window=1), "CapabilityQueue.window is 1; it must be at least 2"),
        (lambda: CapabilityQueue(min_gain=-0.1), "CapabilityQueue.min_gain is -0.1; it must be at least 0"),
        (lambda: CapabilityQueue(min_gain=float("nan")), "CapabilityQueue.min_gain is nan"),
        (lambda: FixedSchedule(window=0), "FixedSchedule.window is 0"),
        (lambda: Sal(AllAtOnce(), max_level=0), "Sal.max_level is 0; it must be at least 1 and at most 1024"),
        (lambda: Sal(AllAtOnce(), max_level=2, step=0), "Sal.step is 0"),
        (
            lambda: FixedSchedule(window=2**32),
            "FixedSchedule.window is 4294967296; it must be at least 2 and at most 2147483648",
        ),
        (lambda: levels(Sal(AllAtOnce(), max_level=2), [float("nan")]), "accuracy is nan; it must be finite"),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        make()
