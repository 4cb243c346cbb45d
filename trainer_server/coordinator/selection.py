"""Client selection (ours), and how an announcement says whom it selects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from fedfmsl.algorithms.draw import Draw, lowest, ticket
from fedfmsl.protocol.messages import MAX_NAMED, DeviceStatus
from trainer_server.config import RunConfig, Selection
from trainer_server.coordinator.limits import devices_in_share

Devices = Mapping[str, DeviceStatus]
FEW = 100  # devices that an announcement names although another form is possible


def eligible_devices(ready: Devices, left_out: Collection[str], least: int) -> Devices:
    """The ready devices without those that are left out; all of them if fewer than `least` would remain."""
    remaining = {name: status for name, status in ready.items() if name not in left_out}
    return remaining if len(remaining) >= least else ready


def select_devices(config: RunConfig, ready: Devices, level: int, round_: int, least: int) -> frozenset[str]:
    """The devices, out of the ready ones, that round `round_` at `level` asks: at least `least`, if there are so many.
    Deterministic."""
    return SELECTIONS[config.select](config, ready, level, round_, least)


def announced_as(
    selected: frozenset[str], ready: Collection[str], excluded: Collection[str], seed: int, round_: int
) -> dict[str, Any]:
    """The fields of `Round` that select exactly these of the devices that are ready, and none that is `excluded`.

    They name the selected devices only if these are few, or are no draw. Then they may be MAX_NAMED at most (see
    `at_most`).
    """
    others = {*ready, *excluded} - selected
    if not others:
        return {}
    if len(selected) <= FEW:
        return {"chosen": tuple(sorted(selected))}
    bound = max(ticket(seed, round_, name) for name in selected)
    unasked = sorted(name for name in others if ticket(seed, round_, name) <= bound)
    if len(unasked) > FEW:
        return {"chosen": tuple(sorted(selected))}
    is_draw = len(unasked) < len(others)
    return {"unasked": tuple(unasked), "draw": Draw(seed, bound) if is_draw else None}


def at_most(
    selected: frozenset[str], ready: Collection[str], excluded: Collection[str], seed: int, round_: int
) -> frozenset[str]:
    """These of the ready devices, or a draw of MAX_NAMED of them if an announcement can select no more."""
    is_short = "chosen" not in announced_as(selected, ready, excluded, seed, round_)
    return selected if is_short else frozenset(lowest(selected, MAX_NAMED, seed, round_))


def _all(config: RunConfig, ready: Devices, level: int, round_: int, least: int) -> frozenset[str]:
    return frozenset(ready)


def _random(config: RunConfig, ready: Devices, level: int, round_: int, least: int) -> frozenset[str]:
    """A random share, but at least `least`."""
    wanted = max(devices_in_share(config.fraction, len(ready)), least)
    return frozenset(lowest(ready, wanted, config.seed, round_))


def _capable(config: RunConfig, ready: Devices, level: int, round_: int, least: int) -> frozenset[str]:
    """Devices that can train every block of the level; if they are too few, the most capable ones."""
    capable = {name for name, status in ready.items() if status.level_cap >= level}
    ranked = sorted(ready, key=lambda name: (-ready[name].level_cap, name))
    return frozenset(capable) | frozenset(ranked[:least])


SELECTIONS: dict[Selection, Callable[[RunConfig, Devices, int, int, int], frozenset[str]]] = {
    Selection.ALL: _all,
    Selection.RANDOM: _random,
    Selection.CAPABLE: _capable,
}
