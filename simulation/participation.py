"""Which devices take part in a round, from a seeded model (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SPEED_SPREAD = 0.5  # standard deviation of the log of the devices' speeds: the fastest tenth is 3.6 times the slowest


@dataclass(frozen=True)
class Participation:
    """`fraction` of the devices is selected in each round. A selected device drops out with probability `dropout`. Of
    the others, the share `stragglers` misses the round deadline: those that need most time.

    A device's time is its number of training samples divided by its speed, which is constant.
    """

    fraction: float = 1.0
    dropout: float = 0.0
    stragglers: float = 0.0
    seed: int = 0

    def devices(self, sizes: Mapping[str, int], index: int) -> Sequence[str]:
        """The devices whose updates arrive in round `index`, at least one. `sizes`: training samples by device."""
        names = sorted(sizes)
        rng = np.random.default_rng([self.seed, index])
        selected = rng.choice(len(names), max(1, round(self.fraction * len(names))), replace=False)
        present = selected[rng.random(len(selected)) >= self.dropout]
        if not len(present):
            present = selected[:1]
        speeds = np.exp(SPEED_SPREAD * np.random.default_rng(self.seed).standard_normal(len(names)))
        times = {int(device): sizes[names[device]] / speeds[device] for device in present}
        in_time = max(1, math.ceil((1 - self.stragglers) * len(times)))
        return [names[device] for device in sorted(sorted(times, key=times.__getitem__)[:in_time])]


def assign_level_caps(names: Sequence[str], caps: Sequence[int], seed: int) -> dict[str, int]:
    """A level cap for each device: as many devices with each of `caps`, in random order. None without `caps`."""
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[device]: caps[turn % len(caps)] for turn, device in enumerate(order)} if caps else {}
