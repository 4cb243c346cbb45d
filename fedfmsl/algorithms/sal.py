"""SAL, Sparsely Activated LoRA: when to activate more blocks (ours; the paper states only that it is progressive).

The server runs it over the rounds of stage 1, each device over its local expert in stage 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedfmsl.protocol.messages import Sal, Trigger


@dataclass(frozen=True)
class SalState:
    """The level, the capability queue (the last accuracies at this level), and how many have been seen in all."""

    level: int = 1
    queue: tuple[float, ...] = ()
    seen: int = 0


def observe(sal: Sal, state: SalState, accuracy: float) -> SalState:
    """The state after one more accuracy. Levels only grow, by `step` blocks, never past `max_level`."""
    state = replace(state, queue=(*state.queue, accuracy)[-sal.window :], seen=state.seen + 1)
    if state.level < sal.max_level and TRIGGERS[sal.trigger](sal, state):
        return replace(state, level=min(state.level + sal.step, sal.max_level), queue=())
    return state


def first_level(sal: Sal) -> int:
    return sal.max_level if sal.trigger is Trigger.ALL_AT_ONCE else 1


def _capability_queue(sal: Sal, state: SalState) -> bool:
    """The queue is full and its best accuracy improves on its first by less than `min_gain`, relatively."""
    first, best = state.queue[0], max(state.queue)
    gained = best > first and best - first >= sal.min_gain * first
    return len(state.queue) == sal.window and not gained


def _fixed_schedule(sal: Sal, state: SalState) -> bool:
    """Every `window` rounds."""
    return len(state.queue) == sal.window


TRIGGERS: dict[Trigger, Callable[[Sal, SalState], bool]] = {
    Trigger.CAPABILITY_QUEUE: _capability_queue,
    Trigger.FIXED_SCHEDULE: _fixed_schedule,
    Trigger.ALL_AT_ONCE: lambda sal, state: False,  # there is nothing left to activate
}
