"""Receives the global blobs of a round in chunks, checks and stores them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from edge_runtime.store.global_store import GlobalStore
from fedfmsl.common.backoff import GAP, Backoff, Timeout
from fedfmsl.errors import MessageError
from fedfmsl.protocol.chunks import CHUNK_BYTES, Assembler, Chunk
from fedfmsl.protocol.tensors import blob_hash
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received

logger = logging.getLogger(__name__)


@dataclass
class _Download:
    """A blob that is not complete. `timeout`: until missing chunks are asked for. `gap`: a single chunk that is asked
    for, because the broker has dropped some."""

    assembler: Assembler
    timeout: Timeout
    gap: int | None = None
    logged: bool = False


class GlobalsReceiver:
    """`bytes_down`: received bytes that no completed round has reported yet. `chunk_bytes`: the size of chunks, as the
    server's status says."""

    def __init__(
        self, link: Link, topics: Topics, store: GlobalStore, max_bytes: int, name: str = "", gap: Backoff = GAP
    ) -> None:
        """A blob has at most `max_bytes`. Devices with different names do not ask at the same moment."""
        self.bytes_down = 0
        self.chunk_bytes = CHUNK_BYTES
        self._link = link
        self._topics = topics
        self._store = store
        self._max_bytes = max_bytes
        self._name = name
        self._gap = gap
        self._downloads: dict[str, _Download] = {}
        self._received: dict[str, bytes] = {}  # complete blobs that are not stored yet

    def fetch(self, sha256: str) -> bool:
        """Whether the blob is stored already. If not, subscribes to its chunks."""
        if self._store.read(sha256) is not None:
            return True
        self._downloads.setdefault(sha256, _Download(Assembler(self._max_bytes), Timeout(self._gap, self._name)))
        self._link.subscribe(self._topics.globals_chunk(sha256, "+"))
        return False

    def fetch_missing(self) -> None:
        """Asks for missing chunks one by one, to be called at every tick. A broker whose queue is full drops messages,
        also retained ones; it sends them again to each new subscription. The intervals grow while nothing arrives."""
        for sha256, download in self._downloads.items():
            if not download.timeout.expired():
                continue
            missing = download.assembler.missing
            if not download.logged:
                download.logged = True
                total = download.assembler.count
                have = f"{total - len(missing)} of {total}" if total else "no"
                logger.warning(
                    f"{have} chunks of the globals {sha256[:12]}… arrived; asking for the others. If this repeats, "
                    "check the broker's limits (size and number of messages) and access rules"
                )
            if missing:
                self._fetch_chunk(sha256, download, missing[0])
            else:
                self._link.subscribe(self._topics.globals_chunk(sha256, "+"))

    def keep_only(self, required: set[str]) -> None:
        """Drops all other blobs."""
        for sha256 in self._downloads.keys() - required:
            self._forget(sha256)
        for sha256 in self._received.keys() - required:
            del self._received[sha256]

    def receive(self, message: Received) -> None:
        """Raises MessageError if the message is not a chunk, or the complete blob is not the announced one."""
        sha256 = self._topics.globals_of(message.topic)
        if sha256 is None or sha256 not in self._downloads:  # amqtt sends a new client all retained messages
            return
        self.bytes_down += len(message.payload)
        download = self._downloads[sha256]
        if Chunk.read(message.payload, self._max_bytes).size != self.chunk_bytes:
            return  # a server that used smaller chunks before its restart has left it on the broker
        download.timeout.restart()
        blob = download.assembler.add(message.payload)
        if blob is None:
            missing = download.assembler.missing
            if download.gap is not None and download.gap not in missing and missing:
                self._fetch_chunk(sha256, download, missing[0])
            return
        if blob_hash(blob) != sha256:
            raise MessageError(f"the blob under {sha256[:12]}… has another SHA-256")
        self._forget(sha256)
        self._received[sha256] = blob

    def store_next(self) -> str | None:
        """Stores one complete blob and returns its SHA-256; None if there is none. Raises OSError if the disk is full.
        The blob stays in memory then, for another attempt."""
        for sha256, blob in self._received.items():
            self._store.write(blob)
            del self._received[sha256]
            return sha256
        return None

    def _fetch_chunk(self, sha256: str, download: _Download, index: int) -> None:
        if download.gap is not None:
            self._link.unsubscribe(self._topics.globals_chunk(sha256, download.gap))
        download.gap = index
        self._link.subscribe(self._topics.globals_chunk(sha256, index))

    def _forget(self, sha256: str) -> None:
        download = self._downloads.pop(sha256)
        self._link.unsubscribe(self._topics.globals_chunk(sha256, "+"))
        if download.gap is not None:
            self._link.unsubscribe(self._topics.globals_chunk(sha256, download.gap))
