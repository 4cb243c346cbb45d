"""From messages to events: what of the broker's traffic means something to the coordinator."""

from __future__ import annotations

from collections.abc import Container

from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import DeviceStatus, Update, parse
from fedfmsl.protocol.tensors import unpack
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Received
from trainer_server.coordinator.events import StatusSeen, UpdateSeen
from trainer_server.storage.uploads import Upload, Uploads


class Decoder:
    def __init__(self, topics: Topics, uploads: Uploads) -> None:
        self._topics = topics
        self._uploads = uploads

    def read(self, received: Received, known: Container[str]) -> tuple[StatusSeen | UpdateSeen | None, Upload | None]:
        """The event that a message completes, and where the update in it lies; `known` are the devices that have
        announced themselves. One that nobody asked for means nothing: amqtt sends a new client what is retained for
        any other.

        Raises MessageError if it does not fit the contract, OSError if a chunk cannot be written.
        """
        device = self._topics.device_of(received.topic)
        if device is None or not received.payload:
            return None, None
        if received.topic == self._topics.status(device):
            return StatusSeen(self._status(device, received.payload)), None
        named = self._topics.update_of(received.topic)
        if named is None:
            return None, None
        if device not in known:
            raise MessageError(f"device {device!r} has not announced itself")
        upload = self._uploads.add(*named, received.payload)
        return (None, None) if upload is None else (self._update(named, upload), upload)

    @staticmethod
    def _status(device: str, payload: bytes) -> DeviceStatus:
        status = parse(DeviceStatus, payload)
        if status.device != device:
            raise MessageError(f"names device {status.device!r}")
        return status

    def _update(self, named: tuple[str, int], upload: Upload) -> UpdateSeen:
        try:
            update, tensors = unpack(upload.blob, Update)
            if (update.device, update.round) != named:
                raise MessageError(f"the update inside is of {update.device!r}, round {update.round}")
        except MessageError:
            self._uploads.discard(upload)
            raise
        return UpdateSeen(update, tensors, upload.sha256, upload.size)
