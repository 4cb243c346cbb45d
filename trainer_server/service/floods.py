"""Devices that flood the server are named, ignored, and their retained messages removed (ours).

A flood is traffic that serves no update: chunks that never become one, updates that do not count, too many messages.
Each device has an allowance for lost and repeated messages, which is renewed every minute and grows with the rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedfmsl.protocol.chunks import CHUNK_BYTES, chunk_count
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Oversize, Received

WINDOW_SECONDS = 60.0
UPDATES, UPDATES_PER_ROUND = 8, 2  # without effect, of the largest size, that a device may send in a window
SPARE_BYTES, SPARE_MESSAGES = 4_000_000, 1000  # also allowed
SWEEP_SECONDS = 20.0  # between two looks for retained messages of a device that is ignored


@dataclass(slots=True)
class _Waste:
    size: int = 0
    messages: int = 0


class FloodGuard:
    """Counts what devices send. `dropped`: the devices that are ignored."""

    def __init__(self, largest_update: int, devices: int, dropped: set[str]) -> None:
        """`largest_update`: bytes of its blob. `devices`: the most names that are counted in a window. `dropped`: the
        devices that are ignored already; others are added to it."""
        self.dropped = dropped
        self._largest, self._devices = largest_update, devices
        self._chunk_bytes = CHUNK_BYTES
        self._waste: dict[str, _Waste] = {}
        self._rounds = 0
        self._since = 0.0

    def use_chunks_of(self, size: int) -> None:
        self._chunk_bytes = size

    def round_opened(self) -> None:
        self._rounds += 1

    def counted(self, device: str, size: int) -> None:
        """An update of `size` bytes on the wire counts, so its messages are no waste."""
        waste = self._waste.setdefault(device, _Waste())
        waste.size -= size
        waste.messages -= chunk_count(size, self._chunk_bytes)

    def received(self, device: str, size: int, now: float) -> str:
        """Counts a message of `size` bytes. If it is too many, drops the device and returns what it has sent. More
        names in a window than this run may have devices are not counted."""
        if now >= self._since + WINDOW_SECONDS:
            self._since, self._rounds = now, 0
            self._waste.clear()
        if device not in self._waste and len(self._waste) >= self._devices:
            return ""
        waste = self._waste.setdefault(device, _Waste())
        waste.size += size
        waste.messages += 1
        updates = UPDATES + UPDATES_PER_ROUND * self._rounds
        most = SPARE_MESSAGES + updates * chunk_count(self._largest, self._chunk_bytes)
        if waste.size <= SPARE_BYTES + updates * self._largest and waste.messages <= most:
            return ""
        self.dropped.add(device)
        return f"{waste.messages} messages and {waste.size / 1e6:.0f} MB of no use within a minute"


class Sweeper:
    """Removes the retained messages of dropped devices in all runs that this server may read."""

    def __init__(self, link: Link, topics: Topics, dropped: set[str]) -> None:
        self._link = link
        self._topics = topics
        self._dropped = dropped
        self._due = 0.0
        link.drops = self._drops

    def _drops(self, topic: str) -> bool:
        """For the link's own thread: so a flood costs no more than its reading."""
        return bool(self._dropped) and self._topics.device_of(topic) in self._dropped

    def is_sweep(self, topic: str) -> bool:
        return topic in {self._filter(device) for device in self._dropped}

    def sweep(self, now: float) -> None:
        """Asks the broker for their retained messages, which a new subscription delivers."""
        if self._dropped and now >= self._due:
            self._due = now + SWEEP_SECONDS
            for device in self._dropped:
                self._link.unsubscribe(self._filter(device))
                self._link.subscribe(self._filter(device))

    def remove(self, received: Received) -> None:
        if received.retained and received.payload:
            self._link.publish(received.topic, b"", retain=True)

    def sender(self, event: Received | Oversize) -> str | None:
        """The dropped device that a message is of, in any run."""
        parts = event.topic.removeprefix(f"{self._topics.prefix}/").split("/")
        found = len(parts) > 3 and parts[1] == "devices" and parts[2] in self._dropped
        return parts[2] if found else None

    def _filter(self, device: str) -> str:
        return f"{self._topics.prefix}/+/devices/{device}/#"
