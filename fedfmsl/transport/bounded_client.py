"""paho's client with bounded memory, the reason of a failed connection, and reconnection spread over time.

paho reads a packet of any length into memory (MQTT allows 256 MB), and messages faster than their receiver takes them.
It loses the reason for which a connection failed. After an outage it reconnects all clients at the same moment.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.client import _WebsocketWrapper
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from fedfmsl.common.backoff import Backoff
from fedfmsl.transport.settings import SERVER_NAME

MAX_PAYLOAD = 256 * 1024  # bytes of a message; the longest of this project is a chunk of 96 KB and its header
_HEAD = 2 + 65535 + 2  # largest head of a packet: length of the topic, topic, packet number
_MAX_PACKET = _HEAD + MAX_PAYLOAD
_BLOCK = 1 << 16
_PAUSE_SECONDS = 0.05  # between two looks at what is published, while the receiver is behind
RECONNECT = Backoff(first=4.0, longest=60.0)


class BoundedClient(paho.Client):
    """Keeps at most MAX_PAYLOAD, the head and two socket blocks of a packet in memory.

    A longer packet is read to its end and delivered truncated; `packet_size` is its full size. paho acknowledges it, so
    the broker does not send it again.

    While `is_behind()` it reads nothing, and TCP holds the broker back. It still sends what is published, and pings, so
    the broker keeps the connection. It reads on once `caught_up` is set.
    """

    def __init__(self, client_id: str, websocket: bool, is_behind: Callable[[], bool], backoff: Backoff) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id,
            protocol=paho.MQTTv311,
            transport="websockets" if websocket else "tcp",
        )
        self.closing = threading.Event()  # stops the attempts to connect
        self.caught_up = threading.Event()  # a fixed pause would limit how many messages are read in a second
        self.last_error: OSError | None = None  # of the socket, or of the attempt to connect
        self.peer_until = 0.0  # when the broker's certificate expires, in unix seconds; 0 without TLS
        self._is_behind = is_behind
        self._backoff = backoff
        self._attempts = 0  # to connect, since the last connection

    @property
    def packet_size(self) -> int:
        """Bytes of the current packet without its fixed header, as its sender announced them."""
        return int(self._in_packet["remaining_length"])

    def reconnect(self) -> MQTTErrorCode:
        try:
            return super().reconnect()
        except OSError as error:
            self.last_error = error
            raise

    def _packet_read(self) -> MQTTErrorCode:
        if self._pauses():
            self.caught_up.clear()
            if self._pauses():  # also after `clear`, which may have followed the receiver's `set`
                self.caught_up.wait(_PAUSE_SECONDS)
            return MQTTErrorCode.MQTT_ERR_AGAIN
        return super()._packet_read()

    def _check_keepalive(self) -> None:
        if self._pauses():  # the broker's answers to pings are not read
            with self._msgtime_mutex:
                self._last_bytes_received = time.monotonic()
            self._ping_t = 0.0
        super()._check_keepalive()

    def _pauses(self) -> bool:
        return self.is_connected() and self._is_behind()

    def use_context(self, context: ssl.SSLContext) -> None:
        """For later connections. paho's `tls_set_context` can be called once only."""
        self._ssl_context = context

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        """The run's server has a certificate for the same host as the broker, for the bundle's HTTPS. It must not pass
        for the broker."""
        sock = super()._ssl_wrap_socket(tcp_sock)
        certificate: dict[str, Any] = dict(sock.getpeercert() or {})
        names = dict(pair for group in certificate.get("subject", ()) for pair in group)
        if names.get("commonName") == SERVER_NAME:
            sock.close()
            raise ssl.SSLError(f"its certificate is that of the run's {SERVER_NAME}; check --broker")
        self.peer_until = float(ssl.cert_time_to_seconds(certificate["notAfter"])) if certificate else 0.0
        return sock

    def _sock_recv(self, bufsize: int) -> bytes:
        # paho appends the result to `received`. The head and one byte too many stay; the rest is dropped before more
        # is read. Nothing of a short packet is dropped.
        received = self._in_packet["packet"]
        del received[_MAX_PACKET + 1 :]
        try:
            return super()._sock_recv(min(bufsize, _BLOCK))
        except BlockingIOError:
            raise
        except OSError as error:
            self.last_error = error
            raise

    def _sock_send(self, buf: bytes | bytearray) -> int:
        try:
            return super()._sock_send(buf)
        except BlockingIOError:
            raise
        except OSError as error:
            self.last_error = error
            with contextlib.suppress(BlockingIOError, ConnectionError):
                self._sock_recv(1)  # a peer that refuses the connection has sent an alert with its reason
            raise

    def _create_socket(self) -> paho.SocketLike:
        if self._transport != "websockets":
            return super()._create_socket()
        sock = self._create_socket_connection()
        if self._ssl:
            sock = self._ssl_wrap_socket(sock)
        sock.settimeout(self._connect_timeout)
        return _StreamedFrames(sock, self._host, self._port, self._ssl, self._websocket_path, None)

    def _reconnect_wait(self) -> None:
        # A restart of the broker disconnects all clients at once. paho's fixed delays would reconnect all at once.
        self._attempts = 0 if self._reconnect_delay is None else self._attempts + 1  # None once connected
        self._reconnect_delay = round(self._backoff.delay(self._attempts))
        self.closing.wait(random.uniform(1, self._reconnect_delay))


class _StreamedFrames(_WebsocketWrapper):
    """paho's WebSocket that delivers a frame's payload as it arrives. paho's own keeps a whole frame (with mosquitto a
    whole MQTT packet) in memory and copies all of it at every read."""

    _left = 0  # missing bytes of the frame's payload
    _start = b""  # received bytes of a frame's header, or of a control frame

    def _recv_impl(self, length: int) -> bytes:
        try:
            while not self._left:
                self._begin_frame()
            data = self._read(min(length, self._left))
        except ConnectionError:
            self.connected = False
            return b""
        self._left -= len(data)
        return data

    def _begin_frame(self) -> None:
        """Reads a frame's header. Answers and skips control frames. Raises BlockingIOError if bytes are missing."""
        self._collect(2)
        opcode, size = self._start[0] & 0x0F, self._start[1]
        if size > 127:
            raise ConnectionAbortedError("the broker sent a masked frame, which RFC 6455 (5.1) forbids")
        extended = {126: 2, 127: 8}.get(size, 0)
        self._collect(2 + extended)
        if extended:
            size = int.from_bytes(self._start[2:], "big")
        if opcode in (self.OPCODE_BINARY, self.OPCODE_CONTINUATION):
            self._left, self._start = size, b""
            return
        if size > 125:
            raise ConnectionAbortedError("the broker sent a control frame that is too long")
        self._collect(2 + size)
        payload, self._start = self._start[2:], b""
        if opcode == self.OPCODE_PING:
            self._socket.send(self._create_frame(self.OPCODE_PONG, bytearray(payload)))
        elif opcode == self.OPCODE_CONNCLOSE:
            raise ConnectionAbortedError("the broker closed the WebSocket")

    def _collect(self, size: int) -> None:
        while len(self._start) < size:
            self._start += self._read(size - len(self._start))

    def _read(self, size: int) -> bytes:
        data = self._socket.recv(size)
        if not data:
            raise ConnectionAbortedError("the broker closed the connection")
        return data
