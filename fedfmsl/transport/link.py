"""The MQTT link of every process: one paho client behind a queue of events.

paho's thread only puts events into the queue; the owner of the link takes them out, so no lock is needed. Once
MAX_EVENTS wait in the queue, paho's thread reads no more messages, so memory stays bounded. It never waits, so the
connection lasts however long the owner takes.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.reasoncodes import ReasonCode

from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import BrokerError, ClockError
from fedfmsl.transport.address import netloc, parse_address, require_loopback
from fedfmsl.transport.bounded_client import MAX_PAYLOAD, RECONNECT, BoundedClient
from fedfmsl.transport.identity import client_context, read_identity
from fedfmsl.transport.outage import Outage
from fedfmsl.transport.tls_errors import explain, is_early, is_rejection

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
KEEPALIVE_SECONDS = 15  # a half-open connection is detected after at most twice this time
QOS = 1
MAX_EVENTS = 32

# paho's texts for MQTT 3.1.1's return codes about user and password.
_BAD_LOGIN = ("Not authorized", "Bad user name or password")


@dataclass(frozen=True)
class Received:
    """`retained`: the broker had kept the message. Its sender may be gone since."""

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True)
class Oversize:
    """A message longer than MAX_PAYLOAD arrived and was dropped."""

    topic: str
    size: int  # bytes


@dataclass(frozen=True)
class Connected:
    """The broker has accepted a first or later connection. Subscriptions are renewed."""


@dataclass(frozen=True)
class Disconnected:
    reason: str


@dataclass(frozen=True)
class SubscriptionRefused:
    """The broker's access rules forbid a subscription. Each topic once per connection."""

    topic: str

    @property
    def error(self) -> str:
        return f"the broker refuses the subscription to {self.topic}; allow it in the broker's access rules"


@dataclass(frozen=True)
class Posted:
    """An event of the link's owner, from another of its threads."""

    value: object


LinkEvent = Received | Oversize | Connected | Disconnected | SubscriptionRefused | Posted


@dataclass(frozen=True)
class Will:
    """Last will: what the broker publishes, retained, when the connection is lost."""

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
        keepalive: int = KEEPALIVE_SECONDS,
        reconnect: Backoff = RECONNECT,
    ) -> None:
        """`broker`: an address (see `fedfmsl.transport.address`). `identity`: an identity file, for mqtts and wss.

        The link does not rely on sessions that the broker keeps. Raises ConfigError for an invalid address or identity,
        and for an unencrypted connection to another machine unless `insecure`.
        """
        self.events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        self.outage = Outage()
        self.drops: Callable[[str], bool] = lambda topic: False  # live messages on which topics are not delivered
        self._address = address = parse_address(broker)
        if not address.encrypted and not insecure:
            require_loopback(f"traffic to {address.host}", address.host, f"use {address.scheme}s:// with --identity")
        self.subscriptions: set[str] = set()
        self._requested: dict[int, str] = {}  # topic by the packet number of its subscription
        self._requesting = threading.Lock()  # paho's thread may see the answer first
        self._denied: set[str] = set()  # topics
        self._answered = threading.Event()
        self._refusal: str | None = None
        self._refused = False  # the broker has said why, and closes the connection
        self._closing = False
        self._keepalive = keepalive
        self._client = BoundedClient(client_id, address.websocket, self._is_behind, reconnect)
        self._client.max_queued_messages_set(0)
        self._client.ws_set_options(address.path)
        if identity and not address.encrypted:
            logger.warning(
                "--identity is not used for %s://%s, which is unencrypted; use %ss://",
                *(address.scheme, address.host, address.scheme),
            )
        self._valid_from: datetime | None = None
        self.own_until = 0.0  # when this client's certificate expires, in unix seconds; 0 without one
        if address.encrypted:
            valid = read_identity(identity).valid if identity else None
            if valid:
                self._valid_from, self.own_until = valid[0], valid[1].timestamp()
            self._client.tls_set_context(client_context(identity))
        if address.user:
            self._client.username_pw_set(address.user, address.password)
        if will:
            self._client.will_set(will.topic, will.payload, QOS, retain=True)
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.on_subscribe = self._on_subscribe

    def connect(self) -> None:
        """Connects, and reconnects until `close`. Raises BrokerError if the first attempt fails: a ClockError if this
        machine's clock is behind the broker's certificate. It can then be called again."""
        where = f"MQTT broker at {netloc(self._address.host)}:{self._address.port}"
        try:
            self._client.connect(self._address.host, self._address.port, self._keepalive)
        except ssl.SSLError as error:
            kind = ClockError if is_early(error) else BrokerError
            raise kind(f"cannot trust the {where}: {self._explain(error)}") from error
        except socket.gaierror as error:
            raise BrokerError(
                f"no {where}: this machine cannot find the address of that name ({error.strerror}); check --broker and "
                "this machine's name server"
            ) from error
        except (OSError, ValueError) as error:
            tls = " with TLS" if self._address.encrypted else ""
            raise BrokerError(f"no {where} ({error}); start one{tls} or give another --broker") from error
        self._client.loop_start()
        if not self._answered.wait(CONNECT_SECONDS):
            self._refusal = f"no answer within {CONNECT_SECONDS} s; check that --broker names an MQTT port"
        if self._refusal is not None:
            self.close()
            raise BrokerError(f"the {where} refused the connection: {self._refusal}")

    def _explain(self, error: BaseException) -> str:
        return explain(error, self._valid_from)

    @property
    def broker_until(self) -> float:
        """When the broker's certificate expires, in unix seconds; 0 without TLS, and before a connection."""
        return self._client.peer_until

    def renew_identity(self, identity: Path) -> None:
        """From the next connection on, uses a renewed certificate. The present connection stays. May be called in any
        thread. Raises ConfigError as `read_identity` does."""
        if self._address.encrypted and (valid := read_identity(identity).valid):
            self._client.use_context(client_context(identity))
            self._valid_from, self.own_until = valid[0], valid[1].timestamp()

    def subscribe(self, topic: str) -> None:
        """Subscribes now and after every reconnection."""
        self.subscriptions.add(topic)
        self._request(topic)

    def unsubscribe(self, topic: str) -> None:
        self.subscriptions.discard(topic)
        self._client.unsubscribe(topic)

    def publish(self, topic: str, payload: bytes, retain: bool = False, qos: int = QOS) -> paho.MQTTMessageInfo:
        return self._client.publish(topic, payload, qos, retain)

    def next_event(self, timeout: float) -> LinkEvent | None:
        """Waits up to `timeout` seconds."""
        try:
            event = self.events.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None
        if self.events.qsize() <= MAX_EVENTS // 2 and not self._client.caught_up.is_set():
            self._client.caught_up.set()
        return event

    def post(self, value: object) -> None:
        """Adds Posted(value) to the queue, in any thread. Does nothing after `close`."""
        self._put(Posted(value))

    def close(self, last: paho.MQTTMessageInfo | None = None) -> None:
        """Disconnects. First waits up to CONNECT_SECONDS for `last` and all earlier messages. Drops incoming
        messages."""
        self._closing = True
        if last is not None:
            # a client that is not connected cannot wait; the broker publishes its last will
            with contextlib.suppress(RuntimeError, ValueError):
                last.wait_for_publish(CONNECT_SECONDS)
        self._client.closing.set()
        self._client.caught_up.set()
        self._client.disconnect()
        with contextlib.suppress(AttributeError):  # paho's thread may end between paho's look at it and its join
            self._client.loop_stop()

    def _on_connect(
        self, client: paho.Client, data: object, flags: paho.ConnectFlags, reason: ReasonCode, _: object
    ) -> None:
        if reason.is_failure:
            hint = "user, password and identity" if str(reason) in _BAD_LOGIN else "--broker"
            self._refused = True
            self._lost(f"{reason}; check {hint}")
            return
        self.outage.ended()
        self._denied.clear()
        for topic in self.subscriptions.copy():
            self._request(topic)
        self._answered.set()
        self._put(Connected())

    def _request(self, topic: str) -> None:
        with self._requesting:
            _, number = self._client.subscribe(topic, QOS)
            if number is not None:
                self._requested[number] = topic

    def _on_subscribe(
        self, client: paho.Client, data: object, number: int, reasons: list[ReasonCode], _: object
    ) -> None:
        with self._requesting:
            topic = self._requested.pop(number, "")
        if any(reason.is_failure for reason in reasons) and topic not in self._denied:
            self._denied.add(topic)
            self._put(SubscriptionRefused(topic))

    def _on_disconnect(
        self, client: paho.Client, data: object, flags: paho.DisconnectFlags, reason: ReasonCode, _: object
    ) -> None:
        error, self._client.last_error = self._client.last_error, None
        refused, self._refused = self._refused, False
        if refused or self._closing:  # the reason is known
            return
        if isinstance(error, ssl.SSLError):
            self._lost(self._explain(error), is_rejection(error))
        elif self._answered.is_set():
            self._lost(
                f"{error or 'it closed the connection'}; check that it runs and that this identity has no other process"
            )
        else:
            self._lost(
                f"{error or 'it closed the connection without an answer'}; check that this is an MQTT port, user and "
                "password, and that the broker allows retained messages"
            )

    def _on_connect_fail(self, client: paho.Client, data: object) -> None:
        error, self._client.last_error = self._client.last_error, None
        reason = self._explain(error) if isinstance(error, ssl.SSLError) else f"{error}; check that it runs"
        self._lost(reason, is_rejection(error))

    def _lost(self, reason: str, rejected: bool = False) -> None:
        if self._answered.is_set():
            self.outage.lost(reason, rejected)
        else:
            self._refusal = reason
            self._answered.set()
        self._put(Disconnected(reason))

    def _on_message(self, client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # not a valid topic
            return
        if not message.retain and self.drops(topic):
            return
        head = 2 + len(topic.encode()) + (2 if message.qos else 0)
        size = self._client.packet_size - head
        if size > MAX_PAYLOAD:
            self._put(Oversize(topic, size))
        else:
            self._put(Received(topic, bytes(message.payload), message.retain))

    def _put(self, event: LinkEvent) -> None:
        if not self._closing:
            self.events.put(event)

    def _is_behind(self) -> bool:
        return self.events.qsize() >= MAX_EVENTS and not self._closing
