"""A run that cannot go on waits for devices, instead of repeating its round without end (ours).

A round that fewer than `needed_updates` devices can answer would be repeated in vain: the others are offline, paused
(also by their own privacy budget), excluded, or cannot take part. After WAITS_AFTER repeats in a row the run waits:
its round has no deadline until enough devices can answer. With --max-repeats it repeats the round, and ends then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedfmsl.algorithms.secure_aggregation import MIN_DEVICES
from fedfmsl.protocol.messages import DeviceStatus, Stage
from trainer_server.config import MIN_REPORTS
from trainer_server.coordinator.records import listed, number_of
from trainer_server.coordinator.state import Plan, State

WAITS_AFTER = 3  # repeats in a row


def fewest_updates(plan: Plan, state: State) -> int:
    """The fewest updates that the present round closes with."""
    return MIN_REPORTS if plan.schedule[state.position].stage is Stage.CANARY else state.limits.min_updates


def needed_updates(plan: Plan, state: State) -> int:
    """How many updates the present round needs, also for secure aggregation."""
    least = fewest_updates(plan, state)
    return least if plan.schedule[state.position].part is None else max(least, MIN_DEVICES)


def must_wait(plan: Plan, state: State) -> bool:
    """Whether another repeat of the present round would be in vain. A canary round is left out instead."""
    if plan.schedule[state.position].stage is Stage.CANARY:
        return False
    often = state.repeats + 1 >= WAITS_AFTER and state.limits.max_repeats is None
    return often and is_short(plan, state)


def is_short(plan: Plan, state: State) -> bool:
    """Whether too few devices can answer a round."""
    return len(state.ready) < needed_updates(plan, state)


def reason(plan: Plan, state: State) -> str:
    """What the run waits for."""
    return shortage_of(needed_updates(plan, state), plan.config.devices, state.devices, state.excluded)


def remedy(plan: Plan, state: State) -> str:
    """What the operator can do. A lower --min-updates only if the run can have it (`limits.check_change`)."""
    lowest = MIN_DEVICES if plan.config.secure else 1
    can_be_lower = state.limits.min_updates > lowest and plan.config.privacy is None
    lower = "a lower --min-updates, or with " if can_be_lower else ""
    return (
        "It goes on by itself once enough can. Otherwise include devices on the console, or stop the server and resume "
        f"with {lower}--max-repeats, which ends it"
    )


def shortage_of(needed: int, expected: int, devices: Mapping[str, DeviceStatus], excluded: Collection[str]) -> str:
    """How many devices must answer, how many can, and why each of the others cannot. `expected`: those of --devices."""
    missing = {name: why for name, status in sorted(devices.items()) if (why := absence(status, name in excluded))}
    able = len(devices) - len(missing)
    others = [f"{name} ({why})" for name, why in missing.items()]
    absent = f"; {expected - len(devices)} of --devices {expected} have never been online"
    unknown = absent if len(devices) < expected else ""
    names = f". Missing: {listed(others)}" if others else ""
    return f"{number_of(needed, 'device')} must answer and {able} can{names}{unknown}"


def absence(status: DeviceStatus, is_excluded: bool) -> str:
    """Why a device can take part in no round now, or ""."""
    if is_excluded:
        return "excluded by the operator"
    if status.error:
        return status.error
    if not status.online:
        return "offline"
    return f"paused: {status.paused}" if status.paused else ""
