"""paho's client, three things of it mended that matter where a broker or those on it may not be friends.

paho reads a packet of any length into memory before it asks what it is (MQTT allows 256 MB); it loses the reason for
which TLS ended a connection; and after an outage all clients come back in step.
"""

from __future__ import annotations

import contextlib
import random
import threading

import paho.mqtt.client as paho
from paho.mqtt.client import _WebsocketWrapper
from paho.mqtt.enums import CallbackAPIVersion

from fedfmsl.common.backoff import Backoff

MAX_PAYLOAD = 256 * 1024  # of a message that is taken; the longest of ours is a chunk of 96 KB and its head
_HEAD = 2 + 65535 + 2  # at most: the topic's length, the topic, the packet's number
_MAX_PACKET = _HEAD + MAX_PAYLOAD
_BLOCK = 1 << 16
RECONNECT = Backoff(first=4.0, longest=60.0)


class CappedClient(paho.Client):
    """Holds no more of a packet than MAX_PAYLOAD, its head, and two blocks of the socket. What is longer is read to its
    end and handed on cut off, with `announced` saying how long it was: paho then acknowledges it like any other, so the
    broker does not send it again and again."""

    def __init__(self, client_id: str, websocket: bool) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id,
            protocol=paho.MQTTv311,
            transport="websockets" if websocket else "tcp",
        )
        self.leaving = threading.Event()  # no more attempts to connect
        self.last_error: OSError | None = None  # what the socket ended with
        self._attempts = 0  # to connect, since the last connection

    @property
    def announced(self) -> int:
        """Bytes of the packet that is being handled, as its sender gave them, less the fixed head."""
        return int(self._in_packet["remaining_length"])

    def _sock_recv(self, bufsize: int) -> bytes:
        # paho appends to `held` what this returns. Its head (topic and number) and enough to see that the payload is
        # too long stay; what is behind them is dropped before more comes. Nothing is to be dropped of a short packet.
        held = self._in_packet["packet"]
        del held[_MAX_PACKET + 1 :]
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
                self._sock_recv(1)  # a peer that will not have us says why, and is gone: its alert waits to be read
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
        # A broker's restart cuts all clients off at once. paho's fixed delays would bring them back at once.
        self._attempts = 0 if self._reconnect_delay is None else self._attempts + 1  # None once connected
        self._reconnect_delay = round(RECONNECT.delay(self._attempts))
        self.leaving.wait(random.uniform(1, self._reconnect_delay))


class _StreamedFrames(_WebsocketWrapper):
    """paho's WebSocket, but a frame's payload is handed on as it comes; paho's keeps a frame (a whole MQTT packet, to
    mosquitto) until its end, and copies all of it at every read."""

    _left = 0  # bytes of the frame's payload that are still to come
    _opcode = 0
    _start = b""  # what has come of a frame's head, or of a control frame

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
        """Reads a frame's head; answers and steps over control frames. Raises BlockingIOError where bytes lack."""
        self._collect(2)
        opcode, size = self._start[0] & 0x0F, self._start[1]
        if size > 127:
            raise ConnectionAbortedError("a masked frame, which a server may not send (RFC 6455, 5.1)")
        extended = {126: 2, 127: 8}.get(size, 0)
        self._collect(2 + extended)
        if extended:
            size = int.from_bytes(self._start[2:], "big")
        if opcode in (self.OPCODE_BINARY, self.OPCODE_CONTINUATION):
            self._left, self._start = size, b""
            return
        if size > 125:
            raise ConnectionAbortedError("a control frame that is too long")
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
