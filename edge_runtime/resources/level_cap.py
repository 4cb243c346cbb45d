"""The level cap while a device works: lowered when steps take longer than when they were measured, raised again (ours).

A step's slowdown is its time as a share of what the probe measured at the very level it was made at. It says what is
the matter with the device (heat, a poor power supply, others at work), whatever the level: so one that trains at level
1 for its slowness still finds out that it has become fast again. Of the last steps the lower quartile is taken: what
slows a device down slows every step, what disturbs it makes a few much longer. (The median let a simulated device, a
third of whose steps were disturbed, flap ten times as often.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import quantiles

from edge_runtime.resources.probe import BATCH, Plan

SLACK = 1.5  # times what a step was measured at, at the highest level: the pace that was promised
FAST_ENOUGH = 2.0  # seconds: faster steps never lower the cap, whatever the probe measured
RETURN = 0.8  # of the pace: what a step at a higher level must be expected to take before the cap is raised to it
STEPS = 12  # that are looked at


@dataclass(frozen=True)
class LevelCap:
    """`level` is the cap. `measured`: seconds for BATCH samples at each level that fits, from 1 on, by a probe.
    `step_seconds`: what a step may take at most. `ratios`: the slowdowns of the last steps."""

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
        """How much longer steps take than when they were measured; 1 as long as too few have been made."""
        return quantiles(self.ratios, method="inclusive")[0] if len(self.ratios) == STEPS else 1.0

    def bears(self, level: int, share: float = 1.0) -> bool:
        """Whether a step at `level` is expected to take at most this share of what was promised. A device that is as
        fast as when it was measured bears all that was planned."""
        promised = min(max(SLACK * self.measured[max(self.measured)], self.fast_enough), self.step_seconds)
        return level == 1 or self.measured[level] * self.slowdown <= max(share * promised, self.measured[level])


def observe(cap: LevelCap, level: int, seconds: float, samples: int) -> LevelCap:
    """The cap after one more step, of `samples` samples at `level`. The first after a graph was opened is slow for
    reasons of its own, and not to be told here."""
    ratio = seconds / samples * BATCH / cap.measured[level]
    cap = replace(cap, ratios=(*cap.ratios, ratio)[-STEPS:])
    kept = max(k for k in cap.measured if k <= cap.level and cap.bears(k))
    return replace(cap, level=max((k for k in cap.measured if k > cap.level and cap.bears(k, RETURN)), default=kept))
