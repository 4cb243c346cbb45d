"""SAL, Sparsely Activated LoRA: when to activate LoRA in more blocks.

    sal = Sal(CapabilityQueue(window=3, min_gain=0.02), max_level=12)
    state = sal.start()
    state = sal.observe(state, held_out_accuracy)   # after each round

The paper states that activation is progressive; the triggers are ours. The server applies SAL to the rounds of stage 1,
each device to its local expert in stage 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedfmsl.algorithms.checks import check_number, check_range

MAX_WINDOW = 2**31
MAX_LEVEL = 1024


@dataclass(frozen=True)
class CapabilityQueue:
    """Activates more blocks when the queue of the last `window` accuracies is full and its best accuracy is better than
    its first by less than `min_gain`, relatively."""

    window: int = 3
    min_gain: float = 0.02
    kind: Literal["capability-queue"] = "capability-queue"

    def __post_init__(self) -> None:
        check_range(self, "window", at_least=2, at_most=MAX_WINDOW)
        check_range(self, "min_gain", at_least=0)

    def first_level(self, max_level: int) -> int:
        return 1

    def is_due(self, queue: tuple[float, ...]) -> bool:
        first, best = queue[0], max(queue)
        gained = best > first and best - first >= self.min_gain * first
        return len(queue) == self.window and not gained


@dataclass(frozen=True)
class FixedSchedule:
    """Activates more blocks every `window` rounds."""

    window: int = 3
    kind: Literal["fixed-schedule"] = "fixed-schedule"

    def __post_init__(self) -> None:
        check_range(self, "window", at_least=2, at_most=MAX_WINDOW)

    def first_level(self, max_level: int) -> int:
        return 1

    def is_due(self, queue: tuple[float, ...]) -> bool:
        return len(queue) == self.window


@dataclass(frozen=True)
class AllAtOnce:
    """All blocks are active from the start: plain LoRA, the ablation."""

    window: ClassVar[int] = 1
    kind: Literal["all-at-once"] = "all-at-once"

    def first_level(self, max_level: int) -> int:
        return max_level

    def is_due(self, queue: tuple[float, ...]) -> bool:
        return False


Trigger = CapabilityQueue | FixedSchedule | AllAtOnce


@dataclass(frozen=True)
class SalState:
    """`queue`: the last accuracies at this level. `seen`: the number of accuracies so far."""

    level: int = 1
    queue: tuple[float, ...] = ()
    seen: int = 0


@dataclass(frozen=True)
class Sal:
    """Whenever the trigger is due, `step` more blocks are activated, up to `max_level`. Levels never fall."""

    trigger: Trigger
    max_level: int
    step: int = 1

    def __post_init__(self) -> None:
        check_range(self, "max_level", at_least=1, at_most=MAX_LEVEL)
        check_range(self, "step", at_least=1, at_most=MAX_LEVEL)

    def start(self) -> SalState:
        return SalState(level=self.trigger.first_level(self.max_level))

    def observe(self, state: SalState, accuracy: float) -> SalState:
        """The state after one more accuracy, as a share of one. Raises ValueError if it is not finite."""
        check_number("accuracy", accuracy)
        state = replace(state, queue=(*state.queue, accuracy)[-self.trigger.window :], seen=state.seen + 1)
        if state.level < self.max_level and self.trigger.is_due(state.queue):
            return replace(state, level=min(state.level + self.step, self.max_level), queue=())
        return state
