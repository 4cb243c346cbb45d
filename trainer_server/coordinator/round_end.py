"""When a round ends: at its deadline, or when enough devices have answered."""

from __future__ import annotations

import math

from fedfmsl.protocol.messages import Round
from trainer_server.coordinator.limits import devices_in_share, round_seconds
from trainer_server.coordinator.records import number_of
from trainer_server.coordinator.secure_sums import shortage
from trainer_server.coordinator.state import TRAINING, Plan, State
from trainer_server.coordinator.waiting import fewest_updates


def next_deadline(plan: Plan, state: State) -> float:
    """The latest time for the next ClockTicked. A run that is paused, rests or waits has none, and a later session has
    no time to join."""
    announced = state.announced
    if state.held_at is not None or state.waiting:
        return math.inf
    if announced is None:
        return state.since + plan.config.join_timeout if state.round == 0 else math.inf
    return state.since + round_seconds(state.limits, announced, state.stretch, state.slowest)


def is_complete(plan: Plan, state: State, announced: Round) -> bool:
    """Whether enough devices have answered: selected ones only, or all if late updates count. A share of the devices is
    not enough while it is too few for secure aggregation. If all have answered and are too few, a round of training
    waits for its deadline, because it is repeated without end; sums are soon given up."""
    share = state.limits.enough if announced.stage in TRAINING else 1.0
    if len(state.updates) < devices_in_share(share, len(state.expected) - len(state.unable)):
        return False  # without a look at each of ten thousand devices after every message
    answers = len(state.updates) if plan.config.max_staleness else len(state.answered & state.expected)
    if len(state.updates) < fewest_updates(plan, state) or answers < devices_in_share(share, len(state.awaited)):
        return False
    if not why_too_few(plan, state, announced):
        return True
    part = plan.schedule[state.position].part
    return answers >= len(state.awaited) and part is not None and part[0] not in TRAINING


def why_too_few(plan: Plan, state: State, closing: Round) -> str:
    """Why the updates of the round are too few, or ""."""
    count, least = len(state.updates), fewest_updates(plan, state)
    if count < least:
        return f"round {state.round} got {number_of(count, 'update')}, fewer than {least}"
    return "" if plan.schedule[state.position].part is None else shortage(plan, state, closing)
