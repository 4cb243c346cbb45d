"""A simulated device: its own MQTT connection and the state machine of the daemon (`edge_runtime.daemon.state`).

Outbox and globals are in memory instead of on disk. The fleet computes the updates (see `benchmarks.simulated`).
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections import deque
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from benchmarks.simulated_tally import Tally
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
from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import BrokerError, RunError
from fedfmsl.protocol.chunks import CHUNK_BYTES, MAX_BLOB_BYTES, Assembler, chunks
from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import Ack, DeviceStatus, Round, ServerStatus, encode, parse
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import QOS

RECONNECT_SECONDS = (0.5, 1.5)


class Fleet(Protocol):
    """The part of a fleet that its devices use. The `*_socket*` methods are callbacks of paho."""

    host: str
    port: int
    bundle: TaskBundle
    topics: Topics
    level_cap: int
    keepalive: int
    ack_timeout: Backoff
    tally: Tally
    woken: set[Device]

    def compute(self, device: Device, task: Round) -> None: ...
    def open_socket(self, client: paho.Client, data: object, sock: Any) -> None: ...
    def close_socket(self, client: paho.Client, data: object, sock: Any) -> None: ...
    def start_writing(self, client: paho.Client, data: object, sock: Any) -> None: ...
    def stop_writing(self, client: paho.Client, data: object, sock: Any) -> None: ...


class Device:
    """State machine, connection and outbox of one device."""

    def __init__(self, name: str, fleet: Fleet) -> None:
        self.name = name
        self.busy = False
        self.stopped = False
        self._inbox: deque[Event] = deque()
        self._fleet = fleet
        self._topics = fleet.topics
        self._outbox: dict[int, bytes] = {}
        self._assemblers: dict[str, Assembler] = {}
        self._commands: deque[Command] = deque()
        self._reconnect_at = 0.0
        self._status = DeviceStatus(
            device=name,
            online=True,
            instance=secrets.token_hex(8),
            bundle=fleet.bundle.sha256,
            level_cap=fleet.level_cap,
        )
        guard, task = DuplicateNameGuard(self._status.instance), fleet.bundle.task.sha256
        self._state = State(name, guard, fleet.bundle.sha256, task)
        self._attempts = 0
        self._chunk_bytes = CHUNK_BYTES  # as the server's status says
        self._ack_due = math.inf  # deadline of the acknowledgement of the last update
        self._subscriptions = {
            self._topics.ack(name),
            self._topics.server_status,
            self._topics.round,
            self._topics.status(name),
        }
        self.client = self._create_client()

    @property
    def disconnected(self) -> bool:
        return self.stopped and self.client.socket() is None

    def tick(self, now: float) -> None:
        """Called once a second: keepalive, reconnection, and the state machine's timers."""
        if self.client.socket() is not None:
            self.client.loop_misc()
        elif not self.stopped and now >= self._reconnect_at:
            self._reconnect_at = now + random.uniform(*RECONNECT_SECONDS)
            try:
                self.client.connect(self._fleet.host, self._fleet.port, self._fleet.keepalive)
            except OSError:
                if not self._fleet.tally.connections:
                    raise
        if not self.busy and not self.stopped:
            if now >= self._ack_due:
                self._ack_due = math.inf
                self._advance(AckOverdue())
            self._advance(Idle())

    def process_inbox(self) -> None:
        """Handles all received messages and only then starts to work, as the daemon does."""
        if self.busy or self.stopped:
            return
        while self._inbox and not self.busy:
            self._advance(self._inbox.popleft())
        if not self.busy:
            self._advance(Idle())

    def finish(self, round_: int, blob: bytes) -> None:
        """The update of a round has been computed."""
        self.busy = False
        self._outbox[round_] = blob
        self._fleet.tally.updates += 1
        self._advance(WorkDone(round_))
        self.process_inbox()

    def _create_client(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            f"fedfmsl-{self._topics.run}-{self.name}-{self._status.instance}",
            protocol=paho.MQTTv311,
        )
        client.max_queued_messages_set(0)
        client.will_set(self._topics.status(self.name), self._offline(), QOS, retain=True)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_socket_open = self._fleet.open_socket
        client.on_socket_close = self._fleet.close_socket
        client.on_socket_register_write = self._fleet.start_writing
        client.on_socket_unregister_write = self._fleet.stop_writing
        return client

    def _offline(self) -> bytes:
        return encode(self._status.model_copy(update={"online": False}))

    def _advance(self, event: Event) -> None:
        self._state, commands = advance(self._state, event)
        self._commands.extend(commands)
        while self._commands and not self.busy and not self.stopped:
            self._execute(self._commands.popleft())

    def _execute(self, command: Command) -> None:
        if isinstance(command, Fetch):
            self._subscribe(self._topics.globals_chunk(command.sha256, "+"))
        elif isinstance(command, Work):
            self.busy = True
            self._fleet.compute(self, command.round)
        elif isinstance(command, Send):
            self._send(command.round, command.chunks)
        elif isinstance(command, Acknowledge):
            self._outbox.pop(command.ack.round, None)
            self._attempts, self._ack_due = 0, math.inf
            self._fleet.tally.add_ack(command.ack)
        elif isinstance(command, PublishStatus):
            self.client.publish(self._topics.status(self.name), encode(self._status), QOS, retain=True)
        elif isinstance(command, Stop):
            if command.error:
                raise RunError(f"{self.name} stopped: {command.error}")
            self.stopped = True
            self.client.publish(self._topics.status(self.name), self._offline(), QOS, retain=True)
            self.client.disconnect()

    def _send(self, round_: int, only: tuple[int, ...]) -> None:
        blob = self._outbox.get(round_)
        if blob is None:
            return
        self._fleet.tally.sends += 1
        self._ack_due = time.monotonic() + self._fleet.ack_timeout.delay(self._attempts, self.name)
        self._attempts += 1
        for index, chunk in enumerate(chunks(blob, self._chunk_bytes)):
            if only and index not in only:
                continue
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
        self._receive(Reconnected())

    def _on_message(self, client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        topic, payload = message.topic, bytes(message.payload)
        self._fleet.tally.bytes_down += len(payload)
        if not payload:
            return
        if topic == self._topics.server_status:
            status = parse(ServerStatus, payload)
            if status.online and not self.stopped:
                self._execute(PublishStatus())
            self._chunk_bytes = status.chunk_bytes
            self._receive(ServerSeen(status))
        elif topic == self._topics.round:
            announced = parse(Round, payload)
            self._fleet.tally.add_round(announced)
            self._receive(RoundSeen(announced))
        elif topic == self._topics.ack(self.name):
            self._receive(AckSeen(parse(Ack, payload)))
        elif topic == self._topics.status(self.name):
            self._receive(OwnStatusSeen(parse(DeviceStatus, payload)))
        elif (sha256 := self._topics.globals_of(topic)) is not None:
            self._receive_chunk(sha256, payload)

    def _receive_chunk(self, sha256: str, chunk: bytes) -> None:
        """A complete blob is dropped: the simulated computation does not use it."""
        if self._assemblers.setdefault(sha256, Assembler(MAX_BLOB_BYTES)).add(chunk) is not None:
            del self._assemblers[sha256]
            topic = self._topics.globals_chunk(sha256, "+")
            self._subscriptions.discard(topic)
            self.client.unsubscribe(topic)
            self._receive(GlobalArrived(sha256))

    def _receive(self, event: Event) -> None:
        self._inbox.append(event)
        self._fleet.woken.add(self)
