"""Which updates wait for the server's word, and for how long they have."""

from __future__ import annotations

import time

import paho.mqtt.client as paho

from edge_runtime.daemon.timing import ACK_TIMEOUT
from fedfmsl.common.backoff import Backoff


class Retransmissions:
    """The updates that were sent and not acknowledged: which of them is still on its way, and when the server's answer
    is overdue. The server's time begins when the last of them has reached the broker."""

    def __init__(self, device: str, timeout: Backoff = ACK_TIMEOUT) -> None:
        self._device = device
        self._timeout = timeout
        self._last_chunks: dict[int, paho.MQTTMessageInfo] = {}
        self._attempt = 0
        self._since = 0.0

    def sent(self, round_: int, last_chunk: paho.MQTTMessageInfo) -> None:
        self._last_chunks[round_] = last_chunk
        self._since = time.monotonic()

    def acknowledged(self, round_: int) -> None:
        self._last_chunks.pop(round_, None)
        self._attempt = 0

    def start_over(self) -> None:
        """The server has shown itself, or the broker: what was sent before may have been lost with them."""
        self._attempt = 0

    def on_its_way(self, round_: int) -> bool:
        """Whether paho still has it, and delivers it in the end, over a reconnection too."""
        info = self._last_chunks.get(round_)
        try:
            return info is not None and not info.is_published()
        except (RuntimeError, ValueError):  # it was published without a connection
            return False

    def overdue(self) -> bool:
        """To be asked again and again; True once for each time that all that is unanswered ought to be sent again."""
        now = time.monotonic()
        if any(self.on_its_way(round_) for round_ in self._last_chunks):
            self._since = now
            return False
        if not self._last_chunks or now < self._since + self._timeout.delay(self._attempt, self._device):
            return False
        self._attempt += 1
        self._since = now
        return True
