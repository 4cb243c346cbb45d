"""MQTT messages to events of the coordinator."""

from __future__ import annotations

from collections.abc import Container

from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import Activity, DeviceStatus, Health, Update, compact, parse
from fedfmsl.protocol.tensors import unpack
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Received
from trainer_server.coordinator.events import StatusSeen, UpdateSeen
from trainer_server.storage.uploads import Upload, Uploads


class Decoder:
    def __init__(self, topics: Topics, uploads: Uploads) -> None:
        self._topics = topics
        self._uploads = uploads

    def decode(self, received: Received, known: Container[str]) -> tuple[StatusSeen | UpdateSeen | None, Upload | None]:
        """The event that a message completes, and the blob of its update. `known` are the announced devices.

        Messages on other topics give no event: amqtt sends a new client retained messages that it did not subscribe to.
        Raises MessageError if the message is invalid, OSError if a chunk cannot be written.
        """
        device = self._topics.device_of(received.topic)
        if device is None or not received.payload:
            return None, None
        if received.topic == self._topics.status(device):
            return StatusSeen(self._status(device, received.payload)), None
        source = self._topics.update_of(received.topic)
        if source is None:
            return None, None
        if device not in known:
            raise MessageError(f"device {device!r} has not announced itself")
        upload = self._uploads.add(*source, received.payload)
        return (None, None) if upload is None else (self._update(source, upload), upload)

    def health(self, received: Received) -> Health | None:
        """A device's heartbeat. None for other messages, and for one of another version: a sign of life only."""
        device = self._topics.device_of(received.topic)
        if device is None or received.topic != self._topics.health(device) or not received.payload:
            return None
        try:
            health = parse(Health, received.payload)
        except MessageError:
            return None
        return health if health.device == device else None

    def shows_work(self, received: Received, health: Health | None) -> bool | None:
        """Whether a device's live message, with its heartbeat if it is one, shows that it is at work; None if it says
        nothing about it."""
        if health is not None:
            return health.activity is Activity.WORKING
        return True if self._topics.update_of(received.topic) is not None else None

    @staticmethod
    def _status(device: str, payload: bytes) -> DeviceStatus:
        status = compact(parse(DeviceStatus, payload))
        if status.device != device:
            raise MessageError(f"names device {status.device!r}")
        return status

    def _update(self, source: tuple[str, int], upload: Upload) -> UpdateSeen:
        """`source` are the device and the round in the topic; the update's header must name the same."""
        update, tensors = unpack(upload.blob, Update)
        if (update.device, update.round) != source:
            raise MessageError(f"the update inside is of {update.device!r}, round {update.round}")
        return UpdateSeen(compact(update), tensors, upload.sha256, upload.size)
