"""What the server receives: each message is added to a batch, or refused."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from fedfmsl.errors import BrokerError, MessageError, RunError
from fedfmsl.protocol.messages import ServerStatus, parse
from fedfmsl.protocol.tensors import blob_bytes
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Disconnected, Link, LinkEvent, Oversize, Received, SubscriptionRefused
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import (
    StatusSeen,
    UpdateRefused,
    UpdateSeen,
)
from trainer_server.coordinator.state import Plan
from trainer_server.service.batch import Batch
from trainer_server.service.decode import Decoder
from trainer_server.service.duplicates import DuplicateServerGuard
from trainer_server.service.floods import FloodGuard, Sweeper
from trainer_server.service.liveness import Liveness
from trainer_server.service.publisher import Publisher
from trainer_server.service.refusals import Refusals
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.observations import Observations
from trainer_server.storage.run_store import RunStore
from trainer_server.storage.uploads import Upload, Uploads

logger = logging.getLogger(__name__)

FLOODS = "it floods the server, which ignores it"


class Receiver:
    def __init__(
        self,
        plan: Plan,
        store: RunStore,
        link: Link,
        topics: Topics,
        publisher: Publisher,
        observations: Observations,
        refusals: Refusals,
        instance: str,
        flooding: set[str],
        allowed: frozenset[str] | None,
    ) -> None:
        """`instance`: that of this server. `flooding`: the devices that are ignored; others are added to it.
        `allowed`: the devices that may take part; None: all."""
        self.uploads = Uploads(store.folder / "uploads", blob_bytes(plan.largest_update))
        self.guard = DuplicateServerGuard(instance)
        self.liveness = Liveness(plan.config.most_devices)
        self.floods = FloodGuard(blob_bytes(plan.largest_update), plan.config.most_devices, flooding)
        self.sweeper = Sweeper(link, topics, flooding)
        self._decoder = Decoder(topics, self.uploads)
        self._plan = plan
        self._store = store
        self._topics = topics
        self._publisher = publisher
        self._observations = observations
        self._refusals = refusals
        self._allowed = allowed

    def receive(self, event: LinkEvent, batch: Batch) -> None:
        """Adds to the batch what the event changes. Raises BrokerError if a subscription is refused, RunError if a
        newer server has taken over the run, OSError if a chunk or an update cannot be written."""
        if isinstance(event, Disconnected):
            self.liveness.disconnected(batch.now)
        elif isinstance(event, SubscriptionRefused):
            if not self.sweeper.is_sweep(event.topic):
                raise BrokerError(event.error)
        elif isinstance(event, Received | Oversize) and self._is_flood(event, batch):
            pass
        elif isinstance(event, Oversize):
            self._refuse(event.topic, batch, "too large", f"{event.size} bytes")
        elif isinstance(event, Received):
            if event.topic == self._topics.server_status:
                self._receive_server_status(event.payload)
            else:
                self._receive(event, batch)

    def _is_flood(self, event: Received | Oversize, batch: Batch) -> bool:
        """Whether a message is of a device that is ignored. The message that shows a flood takes the device out of the
        round."""
        if self.sweeper.sender(event) is None:
            device = self._topics.device_of(event.topic)
            size = event.size if isinstance(event, Oversize) else len(event.payload)
            flood = self.floods.received(device, size, batch.now) if device else ""
            if not flood or device is None:
                return False
            logger.error(
                "%s floods this server (%s): it is ignored until this server is started again; revoke its identity",
                *(device, flood),
            )
            self._refusals.refuse(device, batch.state.devices, "flood", flood)
            known = batch.state.devices.get(device)
            if known is not None and known.online:
                self.apply(StatusSeen(known.model_copy(update={"online": False, "error": FLOODS})), batch)
        if isinstance(event, Received):
            self.sweeper.remove(event)
        return True

    def _receive(self, received: Received, batch: Batch) -> None:
        """Adds a device's message to the batch, or refuses it."""
        device = self._topics.device_of(received.topic)
        if device is not None and self._allowed is not None and device not in self._allowed:
            self._refusals.refuse("", (), "not allowed", f"{device} is not in --allow")
            return
        if received.retained and received.payload and self._topics.update_of(received.topic):
            self.sweeper.remove(received)  # devices publish no retained chunks, which would fill the broker
            self._refuse(received.topic, batch, "retained", f"a chunk of an update on {received.topic[:200]}")
            return
        try:
            event, upload = self._decoder.decode(received, batch.state.devices)
        except MessageError as error:
            about = f"a message on {received.topic[:200]}: {error}"
            self._refuse(received.topic, batch, "unreadable", about)
            return
        seen: StatusSeen | None = None
        health = self._decoder.health(received)
        if health is not None and health.device in batch.state.devices:
            heard = time.time()
            self._observations.heartbeat(health, min(health.time, heard) if received.retained else heard)
        if isinstance(event, StatusSeen):
            seen = self.liveness.status(event.status, received.retained, batch.now)
        elif device and not received.retained:
            known = batch.state.devices.get(device)
            at_work = self._decoder.shows_work(received, health)
            if known is not None and at_work is not None:
                self.liveness.work(device, at_work, batch.now)
            seen = self.liveness.message(device, known is not None and known.online, batch.now)
        if seen is not None:
            self.apply(seen, batch)
        if isinstance(event, UpdateSeen):
            self.apply(event, batch, upload)

    def apply(self, event: StatusSeen | UpdateSeen, batch: Batch, upload: Upload | None = None) -> None:
        """Advances the batch's state."""
        after, commands = advance(self._plan, batch.state, event, batch.now)
        batch.commands += commands
        accepted = isinstance(event, UpdateSeen) and (event.update.round, event.update.device) in after.updates
        if after is batch.state:
            return
        batch.state = after
        if isinstance(event, StatusSeen):
            batch.add_status(event)
        elif not accepted:
            batch.updates.append(LoggedEvent(batch.now, UpdateRefused(event.update.device)))
        else:
            self.floods.counted(event.update.device, event.size)
            batch.updates.append(LoggedEvent(batch.now, replace(event, tensors={})))
            if upload is not None:
                batch.blobs[upload.sha256] = self._store.blobs.updates.append(upload.blob)

    def _receive_server_status(self, payload: bytes) -> None:
        """Raises RunError if a newer server has taken over the run."""
        try:
            status = parse(ServerStatus, payload)
        except MessageError:
            return
        self.guard.receive(status)
        if status.session == self._plan.session and not status.online:  # the last will of this run's previous server
            self._publisher.publish_status(online=True)
        if self.guard.superseded:
            raise RunError(
                f"another server was started for run {self._plan.config.run!r} and took over, from a copy of its "
                "folder or at the same time; stop one of them, or start it with another --run"
            )

    def _refuse(self, topic: str, batch: Batch, kind: str, text: str) -> None:
        self._refusals.refuse(self._topics.device_of(topic) or "", batch.state.devices, kind, text)
