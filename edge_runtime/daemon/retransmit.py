"""When an update is sent again: after a timeout without an acknowledgement."""

from __future__ import annotations

import time
from typing import Protocol

from edge_runtime.daemon.timing import ACK_TIMEOUT
from edge_runtime.store.outbox import UNACKNOWLEDGED
from fedfmsl.common.backoff import Backoff


class Delivery(Protocol):
    """A message on its way to the broker, as `paho.mqtt.client.MQTTMessageInfo`."""

    def is_published(self) -> bool: ...


class Retransmissions:
    """Tracks the updates that are sent and not acknowledged. The timeout starts when the last of them has reached the
    broker."""

    def __init__(self, device: str, timeout: Backoff = ACK_TIMEOUT) -> None:
        self._device = device
        self._timeout = timeout
        self._last_chunks: dict[int, Delivery] = {}
        self._attempt = 0
        self._since = 0.0

    def sent(self, round_: int, last_chunk: Delivery) -> None:
        self._last_chunks[round_] = last_chunk
        while len(self._last_chunks) > UNACKNOWLEDGED:
            del self._last_chunks[min(self._last_chunks)]
        self._since = time.monotonic()

    def acknowledged(self, round_: int) -> None:
        self._last_chunks.pop(round_, None)
        self._attempt = 0

    def reset_backoff(self) -> None:
        """Resets the backoff after a reconnection or a status of the server: earlier messages may be lost."""
        self._attempt = 0

    def is_in_flight(self, round_: int) -> bool:
        """Whether paho still delivers the update. It does so across reconnections."""
        info = self._last_chunks.get(round_)
        try:
            return info is not None and not info.is_published()
        except (RuntimeError, ValueError):  # published without a connection
            return False

    def overdue(self) -> bool:
        """To be called at every tick. True if the unacknowledged updates have to be sent again; restarts the timeout
        then."""
        now = time.monotonic()
        if any(self.is_in_flight(round_) for round_ in self._last_chunks):
            self._since = now
            return False
        if not self._last_chunks or now < self._since + self._timeout.delay(self._attempt, self._device):
            return False
        self._attempt += 1
        self._since = now
        return True
