"""A network that can be made bad: a TCP proxy before a broker, whose faults are switched while it runs.

It knows MQTT just well enough to repeat and swap PUBLISH packets on their way to the broker.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

READ_BYTES = 64 * 1024
PUBLISH, DUPLICATE = 3, 0x08
HELD_SECONDS = 0.05  # a packet to be swapped with the next waits no longer for one
LOOPBACK = "127.0.0.1"
SECONDS = 90.0  # no switch takes longer


class Packets:
    """Splits a stream of bytes into MQTT control packets: a byte of type and flags, the remaining length in one to four
    bytes of seven bits each, and as many bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The packets that are complete now."""
        self._buffer += data
        packets = []
        while (size := self._first_size()) and size <= len(self._buffer):
            packets.append(bytes(self._buffer[:size]))
            del self._buffer[:size]
        return packets

    def _first_size(self) -> int:
        """Of the first packet; 0 while its length is not known."""
        length = 0
        for index, byte in enumerate(self._buffer[1:5]):
            length |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return 2 + index + length
        return 0


def is_acknowledged_publish(packet: bytes) -> bool:
    """A PUBLISH of QoS 1."""
    return packet[0] >> 4 == PUBLISH and packet[0] >> 1 & 3 == 1


@dataclass(eq=False)
class _Connection:
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    broker: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def abort(self) -> None:
        for _, writer in (self.client, self.broker):
            writer.transport.abort()


class Proxy:
    """Faults, all off at first, that may be set at any time from any thread:

    `latency`: seconds that everything takes each way; bandwidth is not touched.
    `repeat`: share of PUBLISH packets of QoS 1 that reach the broker twice, with the same packet identifier.
    `swap`: share of them that the next packet overtakes, if it is such a one too.
    """

    def __init__(self, target_port: int, seed: int = 0) -> None:
        self.latency = 0.0
        self.repeat = 0.0
        self.swap = 0.0
        self.repeated = 0
        self.swapped = 0
        self.accepted = 0  # connections
        self.port = 0
        self._target_port = target_port
        self._seed = seed
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"mqtt://{LOOPBACK}:{self.port}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.admit()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.refuse()
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> int:
        """Every connection is reset; new ones are welcome. Returns how many there were."""
        return self._run(self._cut())

    def refuse(self) -> None:
        """Nobody listens any more; connections that there are stay."""
        self._run(self._refuse())

    def admit(self) -> None:
        """Listens (again)."""
        self._run(self._admit())

    def half_open(self) -> int:
        """Every connection is dead from now on, and neither side is told: sockets stay open, no byte passes. New ones
        are welcome. Returns how many there were."""
        return self._run(self._half_open())

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(SECONDS)

    async def _admit(self) -> None:
        self._server = await asyncio.start_server(self._connect, LOOPBACK, self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _cut(self) -> int:
        connections = list(self._connections)
        for connection in connections:
            connection.abort()
        return len(connections)

    async def _half_open(self) -> int:
        living = [connection for connection in self._connections if connection.tasks]
        for connection in living:
            await _cancel(connection)
        return len(living)

    async def _end(self) -> None:
        for connection in list(self._connections):
            await _cancel(connection)
            connection.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        draw = random.Random(f"{self._seed} {self.accepted}")
        try:
            broker = await asyncio.open_connection(LOOPBACK, self._target_port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection((reader, writer), broker)
        self._connections.add(connection)
        up, down = asyncio.Queue[tuple[float, bytes]](), asyncio.Queue[tuple[float, bytes]]()
        connection.tasks = [
            asyncio.create_task(work)
            for work in (
                self._read_packets(reader, up, draw),
                self._read_bytes(broker[0], down),
                self._write(up, broker[1]),
                self._write(down, writer),
            )
        ]
        writers = connection.tasks[2:]
        await asyncio.wait(writers, return_when=asyncio.FIRST_COMPLETED)
        if any(writer.cancelled() for writer in writers):
            return  # half-open: it stays as it is until the proxy ends
        await _cancel(connection)
        connection.abort()
        self._connections.discard(connection)

    async def _read_bytes(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        while data := await _read(reader):
            self._put(queue, data)
        self._put(queue, b"")

    async def _read_packets(
        self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]], draw: random.Random
    ) -> None:
        packets, held = Packets(), b""
        while True:
            try:
                data = await asyncio.wait_for(_read(reader), HELD_SECONDS if held else None)
            except asyncio.TimeoutError:
                self._put(queue, held)
                held = b""
                continue
            if not data:
                break
            for packet in packets.feed(data):
                held = self._pass_on(packet, held, queue, draw)
        if held:
            self._put(queue, held)
        self._put(queue, b"")

    def _pass_on(
        self, packet: bytes, held: bytes, queue: asyncio.Queue[tuple[float, bytes]], draw: random.Random
    ) -> bytes:
        """Returns the packet that is held back now."""
        publish = is_acknowledged_publish(packet)
        if publish and not held and draw.random() < self.swap:
            return packet
        if held and not publish:
            self._put(queue, held)
        self._put(queue, packet)
        if publish and draw.random() < self.repeat:
            self.repeated += 1
            self._put(queue, bytes([packet[0] | DUPLICATE]) + packet[1:])
        if held and publish:
            self.swapped += 1
            self._put(queue, held)
        return b""

    def _put(self, queue: asyncio.Queue[tuple[float, bytes]], data: bytes) -> None:
        queue.put_nowait((self._loop.time() + self.latency, data))

    async def _write(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        """Whatever is queued, when its time has come; no bytes mean that the sender has closed."""
        while True:
            due, data = await queue.get()
            if (left := due - self._loop.time()) > 0:
                await asyncio.sleep(left)
            if not data:
                return
            try:
                writer.write(data)
                await writer.drain()
            except OSError:
                return


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Nothing once the other side has gone, by whatever way."""
    try:
        return await reader.read(READ_BYTES)
    except OSError:
        return b""


async def _cancel(connection: _Connection) -> None:
    tasks, connection.tasks = connection.tasks, []
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
