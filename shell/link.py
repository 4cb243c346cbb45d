"""The MQTT link: one paho client behind a queue of what happened. Used by the server, the devices and the trial's view.

paho's thread only puts events into the queue; whoever owns the link takes them out, so nothing here needs a lock.
"""

from __future__ import annotations

import contextlib
import queue
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from protocol.errors import BrokerError, ConfigError

CONNECT_SECONDS = 10
KEEPALIVE_SECONDS = 20
QOS = 1


@dataclass(frozen=True)
class Received:
    topic: str
    payload: bytes


@dataclass(frozen=True)
class Connected:
    """The broker has accepted us, for the first time or again; subscriptions are already renewed."""


@dataclass(frozen=True)
class Disconnected:
    reason: str


LinkEvent = Received | Connected | Disconnected


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained, when this client vanishes."""

    topic: str
    payload: bytes


class Link:
    def __init__(self, broker: str, client_id: str, will: Will | None = None, persistent: bool = False) -> None:
        """`broker` is mqtt://[user:password@]host[:port]. A persistent client's subscriptions and unread messages
        survive its absence. Raises ConfigError for another kind of address."""
        self.events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        parts = urlsplit(broker)
        try:
            self._host, self._port = parts.hostname or "", parts.port or 1883
        except ValueError as error:
            raise ConfigError(f"broker address {broker!r}: {error}") from error
        if parts.scheme != "mqtt" or not self._host:
            raise ConfigError(f"broker address {broker!r} is not of the form mqtt://host:port")
        self._subscriptions: set[str] = set()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, clean_session=not persistent, protocol=paho.MQTTv311
        )
        self._client.max_queued_messages_set(0)
        if parts.username:
            self._client.username_pw_set(parts.username, parts.password)
        if will:
            self._client.will_set(will.topic, will.payload, QOS, retain=True)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message

    def connect(self) -> None:
        """Connects and keeps connected until `close`. Raises BrokerError if the first attempt fails."""
        where = f"MQTT broker at {self._host}:{self._port}"
        try:
            self._client.connect(self._host, self._port, KEEPALIVE_SECONDS)
        except (OSError, socket.gaierror) as error:
            raise BrokerError(f"no {where} ({error}); start one or give another --broker") from error
        self._client.loop_start()
        try:
            event = self.events.get(timeout=CONNECT_SECONDS)
        except queue.Empty:
            event = Disconnected(f"no answer within {CONNECT_SECONDS} s")
        if isinstance(event, Disconnected):
            self._client.loop_stop()
            raise BrokerError(f"the {where} refused us: {event.reason}; check user, password and --broker")
        self.events.put(event)

    def subscribe(self, topic: str) -> None:
        """Also after every reconnection."""
        self._subscriptions.add(topic)
        self._client.subscribe(topic, QOS)

    def unsubscribe(self, topic: str) -> None:
        self._subscriptions.discard(topic)
        self._client.unsubscribe(topic)

    def publish(self, topic: str, payload: bytes, retain: bool = False, qos: int = QOS) -> paho.MQTTMessageInfo:
        return self._client.publish(topic, payload, qos, retain)

    def next_event(self, timeout: float) -> LinkEvent | None:
        """Waits up to `timeout` seconds."""
        try:
            return self.events.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None

    def close(self, last: paho.MQTTMessageInfo | None = None) -> None:
        """Leaves in good order; waits a while for `last`, and with it all that was published before it."""
        if last is not None:
            # a client that is not connected cannot wait: the broker's last will speaks for it
            with contextlib.suppress(RuntimeError, ValueError):
                last.wait_for_publish(CONNECT_SECONDS)
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(
        self, client: paho.Client, data: object, flags: paho.ConnectFlags, reason: ReasonCode, _: object
    ) -> None:
        if reason.is_failure:
            self.events.put(Disconnected(str(reason)))
            return
        for topic in self._subscriptions:
            client.subscribe(topic, QOS)
        self.events.put(Connected())

    def _on_disconnect(
        self, client: paho.Client, data: object, flags: paho.DisconnectFlags, reason: ReasonCode, _: object
    ) -> None:
        self.events.put(Disconnected(str(reason)))

    def _on_message(self, client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        self.events.put(Received(message.topic, bytes(message.payload)))
