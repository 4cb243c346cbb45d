"""The MQTT link: one paho client behind a queue of what happened. Used by the server, the devices and the trial's view.

paho's thread only puts events into the queue; whoever owns the link takes them out, so nothing here needs a lock. The
queue is short: when it is full, paho's thread waits, the broker's messages with it, and the memory stays what it is.
"""

from __future__ import annotations

import contextlib
import queue
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.reasoncodes import ReasonCode

from fedfmsl.errors import BrokerError
from fedfmsl.transport.address import parse_address, require_loopback
from fedfmsl.transport.bounded_client import MAX_PAYLOAD, CappedClient
from fedfmsl.transport.identity import client_context, explain, read_identity

CONNECT_SECONDS = 10
KEEPALIVE_SECONDS = 15  # a connection that is dead without a word is noticed after twice that, at the latest
QOS = 1
MAX_EVENTS = 32
LOOK_SECONDS = 0.2  # how soon a thread that waits for room in the queue sees that nobody will make any

# What brokers say in MQTT 3.1.1 when they do not like a name or password, as paho words it.
_REFUSED = ("Not authorized", "Bad user name or password")


@dataclass(frozen=True)
class Received:
    topic: str
    payload: bytes


@dataclass(frozen=True)
class Oversize:
    """A message longer than MAX_PAYLOAD came, and was thrown away unread."""

    topic: str
    size: int  # bytes


@dataclass(frozen=True)
class Connected:
    """The broker has accepted us, for the first time or again; subscriptions are already renewed."""


@dataclass(frozen=True)
class Disconnected:
    reason: str


@dataclass(frozen=True)
class Posted:
    """An event of the link's owner, from another of its threads."""

    value: object


LinkEvent = Received | Oversize | Connected | Disconnected | Posted


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained, when this client vanishes."""

    topic: str
    payload: bytes


class Link:
    def __init__(
        self,
        broker: str,
        client_id: str,
        will: Will | None = None,
        identity: Path | None = None,
        insecure: bool = False,
    ) -> None:
        """`broker` is mqtt[s]:// or ws[s]://[user:password@]host[:port][/path] (see `fedfmsl.transport.address`); `identity` is for
        mqtts and wss (see `fedfmsl.transport.identity`). Nothing depends on what a broker keeps for a client that is away.

        Raises ConfigError for another kind of address or file, and for an unencrypted way to another machine unless it
        is `insecure`."""
        self.events: queue.Queue[LinkEvent] = queue.Queue(MAX_EVENTS)
        self._address = address = parse_address(broker)
        if not address.encrypted and not insecure:
            require_loopback(f"what goes to {address.host}", address.host, f"use {address.scheme}s:// with --identity")
        self._subscriptions: set[str] = set()
        self._answered = threading.Event()
        self._refusal: str | None = None
        self._closing = False
        self._client = CappedClient(client_id, address.websocket)
        self._client.max_queued_messages_set(0)
        self._client.ws_set_options(address.path)
        if address.encrypted:
            self._client.tls_set_context(client_context(read_identity(identity) if identity else None))
        if address.user:
            self._client.username_pw_set(address.user, address.password)
        if will:
            self._client.will_set(will.topic, will.payload, QOS, retain=True)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message

    def connect(self) -> None:
        """Connects and keeps connected until `close`. Raises BrokerError if the first attempt fails."""
        where = f"MQTT broker at {self._address.host}:{self._address.port}"
        try:
            self._client.connect(self._address.host, self._address.port, KEEPALIVE_SECONDS)
        except ssl.SSLError as error:
            raise BrokerError(f"no trust in the {where}: {explain(error)}") from error
        except (OSError, ValueError) as error:
            tls = " that speaks TLS there," if self._address.encrypted else ""
            raise BrokerError(f"no {where} ({error}); start one{tls} or give another --broker") from error
        self._client.loop_start()
        if not self._answered.wait(CONNECT_SECONDS):
            self._refusal = f"no answer within {CONNECT_SECONDS} s; check --broker and its port"
        if self._refusal is not None:
            self.close()
            raise BrokerError(f"the {where} refused us: {self._refusal}")

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

    def post(self, value: object) -> None:
        """Has `next_event` return Posted(value) after all earlier events. May be called in any thread. Waits while the
        queue is full, and does nothing once the link is closed."""
        self._put(Posted(value))

    def close(self, last: paho.MQTTMessageInfo | None = None) -> None:
        """Leaves in good order; waits a while for `last`, and with it all that was published before it. What still
        comes in is thrown away, so that a full queue holds nobody up."""
        self._closing = True
        if last is not None:
            # a client that is not connected cannot wait: the broker's last will speaks for it
            with contextlib.suppress(RuntimeError, ValueError):
                last.wait_for_publish(CONNECT_SECONDS)
        self._client.leaving.set()
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(
        self, client: paho.Client, data: object, flags: paho.ConnectFlags, reason: ReasonCode, _: object
    ) -> None:
        if reason.is_failure:
            hint = "user, password and identity" if str(reason) in _REFUSED else "--broker"
            self._lost(f"{reason}; check {hint}")
            return
        for topic in self._subscriptions.copy():
            client.subscribe(topic, QOS)
        self._answered.set()
        self._put(Connected())

    def _on_disconnect(
        self, client: paho.Client, data: object, flags: paho.DisconnectFlags, reason: ReasonCode, _: object
    ) -> None:
        error, self._client.last_error = self._client.last_error, None
        tls = isinstance(error, ssl.SSLError)
        if tls:
            self._lost(explain(error))
        elif self._answered.is_set():
            self._lost(f"{error or 'it ended the connection'}; is it up, does another process use this identity?")
        else:
            self._lost(f"{error or reason}; check --broker, user and password")

    def _lost(self, reason: str) -> None:
        if not self._answered.is_set():
            self._refusal = reason
            self._answered.set()
        self._put(Disconnected(reason))

    def _on_message(self, client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # not a topic, so not one of ours
            return
        head = 2 + len(topic.encode()) + (2 if message.qos else 0)
        size = self._client.announced - head
        if size > MAX_PAYLOAD:
            self._put(Oversize(topic, size))
        else:
            self._put(Received(topic, bytes(message.payload)))

    def _put(self, event: LinkEvent) -> None:
        """Waits for room as long as somebody may make some."""
        while not self._closing:
            with contextlib.suppress(queue.Full):
                self.events.put(event, timeout=LOOK_SECONDS)
                return
