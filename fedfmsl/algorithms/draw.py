"""A random part of many devices, which each device finds out about itself from its own name (ours).

So an announcement need not name them. A device's ticket is a hash of seed, round and name (as in consistent hashing),
and the devices with the lowest tickets are drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

from fedfmsl.algorithms.checks import check_range

TICKET_BITS = 48  # exact also where numbers of JSON are floating point


@dataclass(frozen=True)
class Draw:
    """The devices with tickets up to `bound`."""

    seed: int
    bound: int

    def __post_init__(self) -> None:
        check_range(self, "seed", at_least=0, at_most=2**53)
        check_range(self, "bound", at_least=0, below=1 << TICKET_BITS)

    def has(self, round_: int, name: str) -> bool:
        """Whether a device is drawn for this round."""
        return ticket(self.seed, round_, name) <= self.bound


def ticket(seed: int, round_: int, name: str) -> int:
    """A device's ticket in a round: uniform in [0, 2^TICKET_BITS)."""
    digest = hashlib.sha256(f"{seed} {round_} {name}".encode()).digest()
    return int.from_bytes(digest[: TICKET_BITS // 8], "big")


def lowest(names: Collection[str], count: int, seed: int, round_: int) -> list[str]:
    """The `count` devices with the lowest tickets, or all of them. They do not depend on the order of the names."""
    return sorted(names, key=lambda name: (ticket(seed, round_, name), name))[:count]
