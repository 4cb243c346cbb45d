"""Receives the global blobs of a round in chunks, checks and stores them."""

from __future__ import annotations

from edge_runtime.store import DeviceStore
from fedfmsl.errors import MessageError
from fedfmsl.protocol.chunks import Assembler
from fedfmsl.protocol.tensors import blob_hash
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received


class GlobalsReceiver:
    """`bytes_down`: received bytes that no completed round has reported yet."""

    def __init__(self, link: Link, topics: Topics, store: DeviceStore, max_bytes: int) -> None:
        """A blob has at most `max_bytes`."""
        self.bytes_down = 0
        self._link = link
        self._topics = topics
        self._store = store
        self._max_bytes = max_bytes
        self._assemblers: dict[str, Assembler] = {}
        self._received: dict[str, bytes] = {}  # complete blobs that are not stored yet

    def fetch(self, sha256: str) -> bool:
        """Whether the blob is stored already. If not, subscribes to its chunks."""
        if self._store.globals.read(sha256) is not None:
            return True
        self._assemblers.setdefault(sha256, Assembler(self._max_bytes))
        self._link.subscribe(self._topics.globals_chunk(sha256, "+"))
        return False

    def keep_only(self, required: set[str]) -> None:
        """Drops all other blobs."""
        for sha256 in self._assemblers.keys() - required:
            self._forget(sha256)
        for sha256 in self._received.keys() - required:
            del self._received[sha256]

    def receive(self, message: Received) -> None:
        """Raises MessageError if the message is not a chunk, or the complete blob is not the announced one."""
        sha256 = self._topics.globals_of(message.topic)
        if sha256 not in self._assemblers:  # amqtt sends a new client the retained messages of all topics
            return
        self.bytes_down += len(message.payload)
        blob = self._assemblers[sha256].add(message.payload)
        if blob is None:
            return
        if blob_hash(blob) != sha256:
            raise MessageError(f"the blob under {sha256[:12]}… has another SHA-256")
        self._forget(sha256)
        self._received[sha256] = blob

    def store_next(self) -> str | None:
        """Stores one complete blob and returns its SHA-256; None if there is none. Raises OSError if the disk is full.
        The blob stays in memory then, for another attempt."""
        for sha256, blob in self._received.items():
            self._store.globals.write(blob)
            del self._received[sha256]
            return sha256
        return None

    def _forget(self, sha256: str) -> None:
        self._link.unsubscribe(self._topics.globals_chunk(sha256, "+"))
        del self._assemblers[sha256]
