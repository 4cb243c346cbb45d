"""What the server publishes on MQTT: its status, the announced round, the globals, acknowledgements."""

from __future__ import annotations

import paho.mqtt.client as paho

from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.messages import Ack, Round, ServerStatus, Verdict, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link
from trainer_server.storage.uploads import Gap


class Publisher:
    """Publishes the server's messages. `last` is the latest message."""

    def __init__(self, link: Link, topics: Topics, status: ServerStatus) -> None:
        self._link = link
        self._topics = topics
        self._status = status
        self._retained: dict[str, int] = {}  # SHA-256 of the globals on the broker → number of their chunks
        self.last: paho.MQTTMessageInfo | None = None

    def use_chunks_of(self, size: int) -> None:
        """From now on, of this server and, as its status says, of its devices."""
        self._status = self._status.model_copy(update={"chunk_bytes": size})

    def forget_globals(self) -> None:
        """Publishes every blob again when it is needed, because the broker may have lost its retained messages."""
        self._retained = {}

    def publish_status(self, online: bool, ended: bool = False) -> None:
        status = self._status.model_copy(update={"online": online, "ended": ended})
        self._publish(self._topics.server_status, encode(status), retain=True)

    def publish_globals(self, sha256: str, blob: bytes) -> None:
        if sha256 in self._retained:
            return
        count = 0
        for count, chunk in enumerate(chunks(blob, self._status.chunk_bytes), start=1):
            self._publish(self._topics.globals_chunk(sha256, count - 1), chunk, retain=True)
        self._retained[sha256] = count

    def announce_round(self, announced: Round) -> None:
        """Also deletes the globals that this round does not use. A device may ask for the task at any time."""
        self._publish(self._topics.round, encode(announced), retain=True)
        for sha256 in set(self._retained) - announced.blobs - {self._status.task}:
            self._delete(sha256)

    def delete_globals(self) -> None:
        """Deletes all that this server has published as globals, its task as well."""
        for sha256 in list(self._retained):
            self._delete(sha256)

    def _delete(self, sha256: str) -> None:
        for index in range(self._retained.pop(sha256)):  # an empty retained message deletes the old one
            self._publish(self._topics.globals_chunk(sha256, index), b"", retain=True)

    def send_ack(self, ack: Ack) -> None:
        self._publish(self._topics.ack(ack.device), encode(ack))

    def ask_for_chunks(self, gap: Gap) -> None:
        """Asks a device for chunks of an update that have not arrived."""
        run, session = self._status.run, self._status.session
        ack = Ack(run=run, session=session, round=gap.round, device=gap.device, verdict=Verdict.INCOMPLETE)
        self.send_ack(ack.model_copy(update={"missing": gap.missing}))

    def _publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        self.last = self._link.publish(topic, payload, retain)
