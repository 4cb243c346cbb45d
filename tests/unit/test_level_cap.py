"""The level cap: lowered by slow steps, raised by fast ones, and left alone by noise."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.engines.base import MemoryPlan
from edge_runtime.resources.level_cap import FAST_ENOUGH, SLACK, STEPS, LevelCap, observe
from edge_runtime.resources.plan import Plan
from edge_runtime.resources.probe import BATCH

SECONDS = {1: 4.0, 2: 8.0, 3: 12.0, 4: 16.0}


def cap_of(seconds: dict[int, float], step_seconds: float = 60.0) -> LevelCap:
    plan = Plan(feature_batch=4, memory_plans=dict.fromkeys(seconds, MemoryPlan(BATCH)), seconds=seconds)
    return LevelCap.planned(plan, step_seconds)


def after(
    cap: LevelCap, slowdown: float, level: int | None = None, steps: int = STEPS, samples: int = BATCH
) -> LevelCap:
    """After that many steps, at the cap's level if it is not told another."""
    for _ in range(steps):
        at = level or cap.level
        cap = observe(cap, at, cap.measured[at] * slowdown * samples / BATCH, samples)
    return cap


@pytest.mark.parametrize(
    ("slowdown", "level"), [(0.5, 4), (1.0, 4), (SLACK, 4), (1.6, 3), (2.0, 3), (2.1, 2), (3.1, 1), (100.0, 1)]
)
@pytest.mark.parametrize("samples", [BATCH, 5])
def test_the_highest_level_that_keeps_to_what_was_promised(slowdown: float, level: int, samples: int) -> None:
    cap = after(cap_of(SECONDS), slowdown, samples=samples)
    assert cap.level == level
    assert cap.slowdown == pytest.approx(slowdown)


def test_no_step_is_expected_to_take_longer_than_it_may() -> None:
    assert after(cap_of(SECONDS, step_seconds=17.0), 1.2).level == 3
    assert after(cap_of(SECONDS, step_seconds=17.0), 1.0).level == 4


def test_steps_that_nobody_waits_for_may_take_longer_than_measured() -> None:
    quick = {1: 0.1, 2: 0.2}
    assert after(cap_of(quick), 0.99 * FAST_ENOUGH / 0.2).level == 2
    assert after(cap_of(quick), 1.01 * FAST_ENOUGH / 0.2).level == 1


def test_too_few_steps_say_nothing() -> None:
    assert after(cap_of(SECONDS), 9.0, steps=STEPS - 1).level == 4


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_device_that_has_become_fast_again_notices_at_whatever_level_it_trains(level: int) -> None:
    slow = after(cap_of(SECONDS), 5.0)
    assert slow.level == 1
    assert after(slow, 1.0, level=level).level == 4


def test_a_little_faster_is_not_enough_to_rise() -> None:
    slow = after(cap_of(SECONDS), 1.6)
    assert slow.level == 3
    assert after(slow, 1.45).level == 3
    assert after(slow, 1.15).level == 4


def test_a_level_that_hardly_kept_within_the_time_comes_back_all_the_same() -> None:
    hot = after(cap_of(SECONDS, step_seconds=16.1), 1.5)
    assert hot.level == 2
    assert after(hot, 1.0).level == 4


def level_changes(seed: int, slowdown: float) -> int:
    """How often the cap changes in 400 steps. Each has 10% of noise, and one in five takes 2 to 20 times as long."""
    rng, cap, levels = np.random.default_rng(seed), cap_of(SECONDS, step_seconds=1e3), []
    for _ in range(400):
        noise = rng.uniform(0.9, 1.1) * (rng.uniform(2, 20) if rng.random() < 0.2 else 1)
        cap = observe(cap, cap.level, cap.measured[cap.level] * slowdown * noise, BATCH)
        levels.append(cap.level)
    return sum(before != now for before, now in pairwise(levels))


def test_the_cap_rarely_changes_on_a_busy_machine() -> None:
    changes = [level_changes(seed, slowdown) for seed, slowdown in enumerate(np.linspace(0.7, 6.0, 150).tolist())]
    assert np.mean(changes) <= 1.5  # one change is needed where the slowdown asks for a lower level
    assert np.mean(np.array(changes) > 3) <= 0.01


@given(
    seconds=st.lists(st.floats(0.1, 50), min_size=1, max_size=6),
    step_seconds=st.floats(50, 100),
    ratios=st.lists(st.floats(0.1, 20), max_size=40),
)
def test_whatever_the_steps_take_the_cap_is_a_level_that_was_measured(
    seconds: list[float], step_seconds: float, ratios: list[float]
) -> None:
    cap = planned = cap_of(dict(enumerate(seconds, 1)), step_seconds)
    for ratio in ratios:
        cap = observe(cap, cap.level, cap.measured[cap.level] * ratio, BATCH)
        assert 1 <= cap.level <= planned.level
        if cap.level > 1:
            expected = cap.measured[cap.level] * cap.slowdown
            assert expected <= max(
                min(max(SLACK * seconds[-1], FAST_ENOUGH), step_seconds), cap.measured[cap.level]
            ) * (1 + 1e-9)
        if cap.slowdown <= 1:
            assert cap.level == planned.level
