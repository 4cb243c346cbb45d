"""A standing run has one session after the other, without an end (ours).

A run is standing with --schedule or --every. When a session has done its last round, the next one begins with the same
task. Its first round opens when the time has come (--every) and there is news: new labelled samples of devices that can
take part, at least --min-new together, or a rollback. A session with new classes needs no other news.

Without a record of what the session before has left unused, a device that cannot train its new samples would begin one
session after the other.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedfmsl.common.duration import seconds_of
from fedfmsl.protocol.messages import DeviceStatus, Message
from trainer_server.coordinator.limits import Limits


class Standing(Message):
    """`begun`: when the first round of the session opened, or of the session before until then; unix seconds of the
    wall clock. `needs_time`, `needs_news`: what the first round waits for. `unused`: by device, new samples that were
    there in the session before and that it has not used."""

    begun: float = 0.0
    needs_time: bool = False
    needs_news: bool = False
    unused: dict[str, int] = {}  # noqa: RUF012 (each instance gets a copy)

    def next(self, ready: Iterable[DeviceStatus]) -> Standing:
        """After the last round of a session. `ready`: the devices that could take part."""
        unused = {status.device: status.new_samples for status in ready if status.new_samples}
        return Standing(begun=self.begun, needs_time=True, needs_news=True, unused=unused)

    def opened(self, wall: float) -> Standing:
        """After the first round of the session has opened."""
        return Standing(begun=wall if self.needs_time or not self.begun else self.begun)

    def with_news(self) -> Standing:
        """After a rollback, or with new classes."""
        return self.model_copy(update={"needs_news": False})

    def seen(self, status: DeviceStatus) -> Standing:
        """A device that has used samples since then has fewer unused ones. A last will says nothing about samples."""
        if not status.online or status.new_samples >= self.unused.get(status.device, 0):
            return self
        return self.model_copy(update={"unused": {**self.unused, status.device: status.new_samples}})

    def due(self, limits: Limits, wall: float) -> float:
        """When the first round may open, by --every. If the clock was set back, a begin lies in the future, and counts
        no more."""
        if not self.needs_time or limits.every is None or self.begun > wall:
            return 0.0
        return self.begun + seconds_of(limits.every)

    def lacks(self, limits: Limits, ready: Iterable[DeviceStatus]) -> str:
        """The news that the first round still needs, or ""."""
        if not self.needs_news:
            return ""
        new = sum(max(status.new_samples - self.unused.get(status.device, 0), 0) for status in ready)
        return "" if new >= limits.min_new else f"{new} new labelled samples, fewer than --min-new {limits.min_new}"
