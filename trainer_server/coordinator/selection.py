"""Client selection (ours)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from fedfmsl.protocol.messages import DeviceStatus
from trainer_server.config import RunConfig, Selection

Devices = Mapping[str, DeviceStatus]
ROUNDING = 1e-9  # tolerance for products like 0.07 · 100, which is above 7 in floating point


def devices_in_share(share: float, count: int) -> int:
    """The number of devices that are a share of `count`: rounded up, so at least one of any."""
    return math.ceil(share * count - ROUNDING)


def select_devices(config: RunConfig, ready: Devices, level: int, round_: int) -> frozenset[str]:
    """The devices, out of the ready ones, that round `round_` at `level` asks. Deterministic."""
    return SELECTIONS[config.select](config, ready, level, round_)


def _all(config: RunConfig, ready: Devices, level: int, round_: int) -> frozenset[str]:
    return frozenset(ready)


def _random(config: RunConfig, ready: Devices, level: int, round_: int) -> frozenset[str]:
    """A random share, but at least `min_updates`."""
    wanted = max(devices_in_share(config.fraction, len(ready)), config.min_updates)
    drawn = np.random.default_rng([config.seed, round_]).permutation(sorted(ready))[:wanted]
    return frozenset(str(name) for name in drawn)


def _capable(config: RunConfig, ready: Devices, level: int, round_: int) -> frozenset[str]:
    """Devices that can train every block of the level; if they are too few, the most capable ones."""
    capable = {name for name, status in ready.items() if status.level_cap >= level}
    ranked = sorted(ready, key=lambda name: (-ready[name].level_cap, name))
    return frozenset(capable) | frozenset(ranked[: config.min_updates])


SELECTIONS: dict[Selection, Callable[[RunConfig, Devices, int, int], frozenset[str]]] = {
    Selection.ALL: _all,
    Selection.RANDOM: _random,
    Selection.CAPABLE: _capable,
}
