"""Client selection (ours)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np

from fedfmsl.protocol.messages import DeviceStatus
from trainer_server.config import RunConfig, Selection
from trainer_server.coordinator.limits import devices_in_share

Devices = Mapping[str, DeviceStatus]


def eligible_devices(ready: Devices, left_out: Collection[str], least: int) -> Devices:
    """The ready devices without those that are left out; all of them if fewer than `least` would remain."""
    remaining = {name: status for name, status in ready.items() if name not in left_out}
    return remaining if len(remaining) >= least else ready


def select_devices(config: RunConfig, ready: Devices, level: int, round_: int, least: int) -> frozenset[str]:
    """The devices, out of the ready ones, that round `round_` at `level` asks: at least `least`, if there are so many.
    Deterministic."""
    return SELECTIONS[config.select](config, ready, level, round_, least)


def _all(config: RunConfig, ready: Devices, level: int, round_: int, least: int) -> frozenset[str]:
    return frozenset(ready)


def _random(config: RunConfig, ready: Devices, level: int, round_: int, least: int) -> frozenset[str]:
    """A random share, but at least `least`."""
    wanted = max(devices_in_share(config.fraction, len(ready)), least)
    drawn = np.random.default_rng([config.seed, round_]).permutation(sorted(ready))[:wanted]
    return frozenset(str(name) for name in drawn)


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
