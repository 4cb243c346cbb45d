"""The level cap during a run: lowered when steps are slower than in the probe, raised again when they are not (ours).

A step's slowdown is its duration divided by the probe's duration at the same level. It describes the device (heat, a
weak power supply, other processes) and not the level: a device that trains at level 1 still notices that it is fast
again. The slowdown is the lower quartile of the last steps: heat slows every step, a disturbance only a few. (With the
median, a simulated device with a third of its steps disturbed changed its cap ten times as often.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import quantiles

from edge_runtime.resources.plan import Plan
from edge_runtime.resources.probe import BATCH

SLACK = 1.5  # a step may take this many times as long as the probe's at the highest level
FAST_ENOUGH = 2.0  # seconds; faster steps never lower the cap
RAISE_SHARE = 0.8  # the cap is raised to a level whose expected step takes at most this share of the limit
STEPS = 12  # number of steps that the slowdown is computed from


@dataclass(frozen=True)
class LevelCap:
    """`level` is the cap. `measured`: the probe's seconds for BATCH samples at each level that fits, from 1 on.
    `step_seconds`: the longest allowed step. `ratios`: the slowdowns of the last steps."""

    level: int
    measured: Mapping[int, float]
    step_seconds: float
    fast_enough: float = FAST_ENOUGH
    ratios: tuple[float, ...] = ()

    @classmethod
    def planned(cls, plan: Plan, step_seconds: float, fast_enough: float = FAST_ENOUGH) -> LevelCap:
        return cls(plan.level_cap, plan.seconds, step_seconds, fast_enough)

    @property
    def slowdown(self) -> float:
        """The duration of steps divided by the probe's; 1 until there are STEPS steps."""
        return quantiles(self.ratios, method="inclusive")[0] if len(self.ratios) == STEPS else 1.0

    def allows(self, level: int, share: float = 1.0) -> bool:
        """Whether a step at `level` is expected to take at most this share of the limit. A device that is as fast as in
        the probe keeps every planned level."""
        limit = min(max(SLACK * self.measured[max(self.measured)], self.fast_enough), self.step_seconds)
        return level == 1 or self.measured[level] * self.slowdown <= max(share * limit, self.measured[level])


def observe(cap: LevelCap, level: int, seconds: float, samples: int) -> LevelCap:
    """The cap after one more step of `samples` samples at `level`. The first step after a graph was opened must not be
    passed: it is always slow."""
    ratio = seconds / samples * BATCH / cap.measured[level]
    cap = replace(cap, ratios=(*cap.ratios, ratio)[-STEPS:])
    kept = max(k for k in cap.measured if k <= cap.level and cap.allows(k))
    return replace(
        cap, level=max((k for k in cap.measured if k > cap.level and cap.allows(k, RAISE_SHARE)), default=kept)
    )
