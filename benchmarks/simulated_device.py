"""One simulated device: its own MQTT connection, and the daemon's own state machine (`edge_runtime.daemon.state`). Outbox and
globals are remembered, not stored; the computation is its fleet's (see `benchmarks.simulated`)."""

from __future__ import annotations

import math
import random
import secrets
import time
from collections import deque
from typing import TYPE_CHECKING

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from edge_runtime.daemon.state import (
    Acknowledge,
    AckOverdue,
    AckSeen,
    Command,
    Event,
    Fetch,
    GlobalArrived,
    Idle,
    OwnStatusSeen,
    PublishStatus,
    Reconnected,
    RoundSeen,
    Send,
    ServerSeen,
    State,
    Stop,
    Work,
    WorkDone,
    advance,
)
from fedfmsl.errors import BrokerError, RunError
from fedfmsl.protocol.chunks import MAX_BLOB_BYTES, Assembler, chunks
from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import Ack, DeviceStatus, Round, ServerStatus, encode, parse
from fedfmsl.transport.link import QOS

if TYPE_CHECKING:
    from benchmarks.simulated import Fleet

RETRY_SECONDS = (0.5, 1.5)


class Device:
    """A device's state, its connection, and what it would keep on disk."""

    def __init__(self, name: str, fleet: Fleet) -> None:
        self.name = name
        self.busy = False
        self.left = False
        self.inbox: deque[Event] = deque()
        self._fleet = fleet
        self._topics = fleet.topics
        self._outbox: dict[int, bytes] = {}
        self._assemblers: dict[str, Assembler] = {}
        self._todo: deque[Command] = deque()
        self._retry = 0.0
        self._status = DeviceStatus(
            device=name,
            online=True,
            instance=secrets.token_hex(8),
            bundle=fleet.bundle.sha256,
            level_cap=fleet.level_cap,
        )
        self._state = State(name, DuplicateNameGuard(self._status.instance), fleet.bundle.sha256)
        self._attempts = 0
        self._overdue = math.inf  # when an answer to what was sent last is waited for no longer
        self._subscriptions = {
            self._topics.ack(name),
            self._topics.server_status,
            self._topics.round,
            self._topics.status(name),
        }
        self.client = self._client()

    def _client(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            f"fedfmsl-{self._topics.run}-{self.name}-{self._status.instance}",
            protocol=paho.MQTTv311,
        )
        client.max_queued_messages_set(0)
        client.will_set(self._topics.status(self.name), self._farewell(), QOS, retain=True)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_socket_open = self._fleet.watch
        client.on_socket_close = self._fleet.unwatch
        client.on_socket_register_write = self._fleet.watch_writing
        client.on_socket_unregister_write = self._fleet.unwatch_writing
        return client

    def _farewell(self) -> bytes:
        return encode(self._status.model_copy(update={"online": False}))

    def look(self, now: float) -> None:
        """Once a second: keep alive or connect again, and let the daemon see that nothing happens."""
        if self.client.socket() is not None:
            self.client.loop_misc()
        elif not self.left and now >= self._retry:
            self._retry = now + random.uniform(*RETRY_SECONDS)
            try:
                self.client.connect(self._fleet.host, self._fleet.port, self._fleet.keepalive)
            except OSError:
                if not self._fleet.tally.connections:
                    raise
        if not self.busy and not self.left:
            if now >= self._overdue:
                self._overdue = math.inf
                self._advance(AckOverdue())
            self._advance(Idle())

    def turn(self) -> None:
        """Takes what has come in, as the daemon does: all of it, and only then does it start to work."""
        if self.busy or self.left:
            return
        while self.inbox and not self.busy:
            self._advance(self.inbox.popleft())
        if not self.busy:
            self._advance(Idle())

    def done(self, round_: int, blob: bytes) -> None:
        """The work it has been busy with lies in the outbox."""
        self.busy = False
        self._outbox[round_] = blob
        self._fleet.tally.updates += 1
        self._advance(WorkDone(round_))
        self.turn()

    def _advance(self, event: Event) -> None:
        self._state, commands = advance(self._state, event)
        self._todo.extend(commands)
        while self._todo and not self.busy and not self.left:
            self._carry_out(self._todo.popleft())

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, Fetch):
            self._subscribe(self._topics.globals_chunk(command.sha256, "+"))
        elif isinstance(command, Work):
            self.busy = True
            self._fleet.think(self, command.round)
        elif isinstance(command, Send):
            self._send(command.round)
        elif isinstance(command, Acknowledge):
            self._outbox.pop(command.ack.round, None)
            self._attempts, self._overdue = 0, math.inf
            self._fleet.acknowledged(command.ack)
        elif isinstance(command, PublishStatus):
            self.client.publish(self._topics.status(self.name), encode(self._status), QOS, retain=True)
        elif isinstance(command, Stop):
            if command.error:
                raise RunError(f"{self.name} left: {command.error}")
            self.left = True
            self.client.publish(self._topics.status(self.name), self._farewell(), QOS, retain=True)
            self.client.disconnect()

    def _send(self, round_: int) -> None:
        blob = self._outbox.get(round_)
        if blob is None:
            return
        self._fleet.tally.sends += 1
        self._overdue = time.monotonic() + self._fleet.ack_timeout.delay(self._attempts, self.name)
        self._attempts += 1
        for index, chunk in enumerate(chunks(blob)):
            self._fleet.tally.bytes_up += len(chunk)
            self.client.publish(self._topics.update_chunk(self.name, round_, index), chunk, QOS)

    def _subscribe(self, topic: str) -> None:
        self._subscriptions.add(topic)
        self.client.subscribe(topic, QOS)

    def _on_connect(
        self, client: paho.Client, data: object, flags: paho.ConnectFlags, reason: ReasonCode, _: object
    ) -> None:
        if reason.is_failure:
            raise BrokerError(f"the broker refused {self.name}: {reason}")
        self._fleet.tally.connections += 1
        client.subscribe([(topic, QOS) for topic in sorted(self._subscriptions)])
        client.publish(self._topics.status(self.name), encode(self._status), QOS, retain=True)
        self._hear(Reconnected())

    def _on_message(self, client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        topic, payload = message.topic, bytes(message.payload)
        self._fleet.tally.bytes_down += len(payload)
        if not payload:
            return
        if topic == self._topics.server_status:
            self._hear(ServerSeen(parse(ServerStatus, payload)))
        elif topic == self._topics.round:
            announced = parse(Round, payload)
            self._fleet.heard(announced)
            self._hear(RoundSeen(announced))
        elif topic == self._topics.ack(self.name):
            self._hear(AckSeen(parse(Ack, payload)))
        elif topic == self._topics.status(self.name):
            self._hear(OwnStatusSeen(parse(DeviceStatus, payload)))
        elif (sha256 := self._topics.globals_of(topic)) is not None:
            self._global_chunk(sha256, payload)

    def _global_chunk(self, sha256: str, chunk: bytes) -> None:
        """A finished blob has the SHA-256 that its chunks announce, and is not needed: the daemon only asks for it."""
        if self._assemblers.setdefault(sha256, Assembler(MAX_BLOB_BYTES)).add(chunk) is not None:
            del self._assemblers[sha256]
            topic = self._topics.globals_chunk(sha256, "+")
            self._subscriptions.discard(topic)
            self.client.unsubscribe(topic)
            self._hear(GlobalArrived(sha256))

    def _hear(self, event: Event) -> None:
        self.inbox.append(event)
        self._fleet.woken.add(self)
