"""Which devices take part in a round, from a seeded model (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer_server.coordinator.limits import devices_in_share

SPEED_SPREAD = 0.5  # standard deviation of the log of the devices' speeds: the fastest tenth is 3.6 times the slowest


@dataclass(frozen=True)
class Participation:
    """`fraction` of the devices is selected in each round of training, rounded up as the server does. Other rounds ask
    all devices. An asked device drops out with probability `dropout`. Of the others, the share `stragglers`, rounded
    down, misses the round deadline: those that need most time.

    A device's time is its number of training samples divided by its speed, which is constant.
    """

    fraction: float = 1.0
    dropout: float = 0.0
    stragglers: float = 0.0
    seed: int = 0

    def devices(self, sizes: Mapping[str, int], index: int) -> Sequence[str]:
        """The devices whose updates arrive in round `index` of training, at least one. `sizes`: training samples by
        device."""
        return self._arrived(sizes, self.fraction, [self.seed, index])

    def all_devices(self, sizes: Mapping[str, int], index: int) -> Sequence[str]:
        """The same for a round that asks all devices, beside round `index` of training."""
        return self._arrived(sizes, 1.0, [self.seed, index, 1])

    def _arrived(self, sizes: Mapping[str, int], fraction: float, seed: Sequence[int]) -> Sequence[str]:
        names = sorted(sizes)
        rng = np.random.default_rng(seed)
        selected = rng.choice(len(names), devices_in_share(fraction, len(names)), replace=False)
        present = selected[rng.random(len(selected)) >= self.dropout]
        if not len(present):
            present = selected[:1]
        speeds = np.exp(SPEED_SPREAD * np.random.default_rng(self.seed).standard_normal(len(names)))
        times = {int(device): sizes[names[device]] / speeds[device] for device in present}
        in_time = devices_in_share(1 - self.stragglers, len(times))
        return [names[device] for device in sorted(sorted(times, key=times.__getitem__)[:in_time])]


def assign_level_caps(names: Sequence[str], caps: Sequence[int], seed: int) -> dict[str, int]:
    """A level cap for each device: as many devices with each of `caps`, in random order. None without `caps`."""
    order = np.random.default_rng(seed).permutation(len(names))
    return {names[device]: caps[turn % len(caps)] for turn, device in enumerate(order)} if caps else {}
