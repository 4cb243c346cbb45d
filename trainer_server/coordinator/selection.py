"""Which devices a round asks (ours)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from fedfmsl.protocol.messages import DeviceStatus
from trainer_server.config import RunConfig, Selection

Devices = Mapping[str, DeviceStatus]
ROUNDING = 1e-9  # 0.07 of 100 are 7, whatever 0.07 · 100 is in binary


def select_devices(config: RunConfig, ready: Devices, level: int, round_: int) -> frozenset[str]:
    """Of the devices that are ready, those that round `round_` at `level` asks. The same arguments give the same
    devices."""
    return SELECTIONS[config.select](config, ready, level, round_)


def _all(config: RunConfig, ready: Devices, level: int, round_: int) -> frozenset[str]:
    return frozenset(ready)


def _random(config: RunConfig, ready: Devices, level: int, round_: int) -> frozenset[str]:
    """A share of them, but no fewer than a round needs."""
    wanted = max(math.ceil(config.fraction * len(ready) - ROUNDING), config.min_updates)
    drawn = np.random.default_rng([config.seed, round_]).permutation(sorted(ready))[:wanted]
    return frozenset(str(name) for name in drawn)


def _capable(config: RunConfig, ready: Devices, level: int, round_: int) -> frozenset[str]:
    """Those that can train every block of the level; where they are too few, the most capable."""
    capable = {name for name, status in ready.items() if status.level_cap >= level}
    ranked = sorted(ready, key=lambda name: (-ready[name].level_cap, name))
    return frozenset(capable) | frozenset(ranked[: config.min_updates])


SELECTIONS: dict[Selection, Callable[[RunConfig, Devices, int, int], frozenset[str]]] = {
    Selection.ALL: _all,
    Selection.RANDOM: _random,
    Selection.CAPABLE: _capable,
}
