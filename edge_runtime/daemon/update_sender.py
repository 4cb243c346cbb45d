"""Sends updates from the outbox until the server has acknowledged them."""

from __future__ import annotations

import logging
from collections.abc import Container

from edge_runtime.daemon.announce import Announcer
from edge_runtime.daemon.retransmit import Retransmissions
from edge_runtime.store.outbox import Outbox
from fedfmsl.common.backoff import Backoff
from fedfmsl.protocol.chunks import CHUNK_BYTES, chunks
from fedfmsl.protocol.messages import Ack, Verdict
from fedfmsl.protocol.topics import Topics

logger = logging.getLogger(__name__)


class UpdateSender:
    def __init__(self, announcer: Announcer, topics: Topics, device: str, outbox: Outbox, timeout: Backoff) -> None:
        """`timeout`: how long an acknowledgement may take."""
        self.chunk_bytes = CHUNK_BYTES  # as the server's status says
        self._announcer = announcer
        self._topics = topics
        self._device = device
        self._outbox = outbox
        self._timeout = timeout
        self._retransmissions = Retransmissions(device, timeout)

    def send(self, round_: int, only: Container[int] = ()) -> None:
        """Sends the update of a round: all chunks, or `only` some. Does nothing while paho still delivers it, as it
        does across reconnections."""
        update = None if self._retransmissions.is_in_flight(round_) else self._outbox.read(round_)
        if update is None:
            return
        for index, chunk in enumerate(chunks(update, self.chunk_bytes)):
            if not only or index in only:
                sent = self._announcer.publish(self._topics.update_chunk(self._device, round_, index), chunk)
                self._retransmissions.sent(round_, sent)

    def acknowledge(self, ack: Ack) -> None:
        self._retransmissions.acknowledged(ack.round)
        try:
            self._outbox.acknowledge(ack.round)
        except OSError as error:  # after a restart the update is sent and acknowledged once more
            logger.warning(f"the update of round {ack.round} is acknowledged but could not be deleted ({error})")
        if ack.verdict is not Verdict.ACCEPTED:
            logger.info(f"update of round {ack.round}: {ack.verdict.value} {ack.reason}")

    def overdue(self) -> bool:
        """To be called at every tick. True if the unacknowledged updates have to be sent again now."""
        return self._retransmissions.overdue()

    def reset_backoff(self) -> None:
        """After a reconnection or a status of the server: earlier messages may be lost."""
        self._retransmissions.reset_backoff()

    def forget(self) -> None:
        """Drops all timeouts, because a new session starts and its server does not acknowledge earlier updates."""
        self._retransmissions = Retransmissions(self._device, self._timeout)
