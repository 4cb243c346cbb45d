"""Blobs cut into chunks that every broker accepts, and put together again.

A *chunk* is a slice of a blob with a header: its size, its index, the number of chunks, and the blob's SHA-256. Some
brokers accept smaller messages than others, so CHUNK_BYTES may be halved several times. A receiver gets
chunks in any order, more than once, and of several blobs. `PartialBlob` counts them. Its subclasses store the
bytes: `Assembler` uses memory, `trainer_server.storage.uploads` uses files.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from fedfmsl.errors import MessageError

CHUNK_BYTES = 96 * 1024  # AWS IoT's limit of 128 KB is the smallest of the hosted brokers
MAX_BLOB_BYTES = 64 * 1024 * 1024
CHUNK_SIZES = tuple(CHUNK_BYTES >> halvings for halvings in range(7))
_HEADER = struct.Struct(">4sII32s")  # magic, index, count, SHA-256 of the blob
HEADER_BYTES = _HEADER.size
_SIZES = {b"FMS%d" % (number + 1): size for number, size in enumerate(CHUNK_SIZES)}  # by magic
_MAGICS = {size: magic for magic, size in _SIZES.items()}


def check_chunk_size(size: int) -> int:
    """Raises ValueError if `size` is not one of CHUNK_SIZES."""
    if size not in CHUNK_SIZES:
        raise ValueError(f"chunks have one of {CHUNK_SIZES} bytes")
    return size


def chunks(blob: bytes, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The chunks of a blob. All bodies but the last have `size` bytes, one of CHUNK_SIZES."""
    digest = hashlib.sha256(blob).digest()
    count = chunk_count(len(blob), size)
    for index in range(count):
        body = blob[index * size : (index + 1) * size]
        yield _HEADER.pack(_MAGICS[size], index, count, digest) + body


def chunk_count(length: int, size: int = CHUNK_BYTES) -> int:
    """The number of chunks of a blob of `length` bytes."""
    return -(-length // size)


@dataclass(frozen=True)
class Chunk:
    """Chunk `index` of the `count` chunks of `size` bytes of the blob with the SHA-256 `digest`."""

    size: int
    index: int
    count: int
    digest: bytes
    body: bytes

    @property
    def blob(self) -> tuple[bytes, int, int]:
        """Equal for the chunks of one blob."""
        return self.digest, self.count, self.size

    @classmethod
    def read(cls, payload: bytes, max_bytes: int) -> Chunk:
        """Raises MessageError if the payload is not a chunk, or if its blob has more chunks than one of `max_bytes`
        (or MAX_BLOB_BYTES, if that is less)."""
        if len(payload) < _HEADER.size:
            raise MessageError("not a chunk: too short")
        magic, index, count, digest = _HEADER.unpack_from(payload)
        size = _SIZES.get(magic)
        if size is None or index >= count:
            raise MessageError("not a chunk: unknown magic or counts out of range")
        if count > chunk_count(min(max_bytes, MAX_BLOB_BYTES), size):
            raise MessageError(f"a blob of {count} chunks: more than {max_bytes} bytes are not expected here")
        length = len(payload) - _HEADER.size
        if not (length == size or (index == count - 1 and 0 < length < size)):
            raise MessageError(f"not a chunk: {length} bytes as number {index + 1} of {count}")
        return cls(size, index, count, digest, payload[_HEADER.size :])


def checked(blob: bytes, digest: bytes) -> bytes:
    """The blob. Raises MessageError unless it has this SHA-256."""
    if hashlib.sha256(blob).digest() != digest:
        raise MessageError("the chunks do not add up to the announced SHA-256")
    return blob


@dataclass(slots=True)
class PartialBlob(ABC):
    """The received chunks of one blob, in any order, repeated or not."""

    _received: int = field(default=0, init=False)  # bit i is set if chunk i has been received

    def add(self, chunk: Chunk) -> bytes | None:
        """Stores a chunk. Returns the whole blob once every chunk has been received.

        Raises MessageError if the whole blob does not have its SHA-256.
        """
        if not self._received >> chunk.index & 1:
            self._write(chunk.index, chunk.size, chunk.body)
            self._received |= 1 << chunk.index
        if self._received.bit_count() < chunk.count:
            return None
        return checked(self._read(), chunk.digest)

    def missing(self, count: int) -> list[int]:
        """The indices of the `count` chunks that have not been received, in order."""
        return [index for index in range(count) if not self._received >> index & 1]

    @abstractmethod
    def _write(self, index: int, size: int, body: bytes) -> None:
        """`size` is the size of all chunks but the last."""

    @abstractmethod
    def _read(self) -> bytes:
        """The bodies of all chunks in order."""


@dataclass(slots=True)
class _InMemory(PartialBlob):
    _bodies: dict[int, bytes] = field(default_factory=dict)

    def _write(self, index: int, size: int, body: bytes) -> None:
        self._bodies[index] = body

    def _read(self) -> bytes:
        return b"".join(body for _, body in sorted(self._bodies.items()))


NO_BLOB = (b"", 0, 0)


class Assembler:
    """Collects the chunks of one blob at a time in memory. A chunk of another blob starts over."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blob = NO_BLOB
        self._partial = _InMemory()

    @property
    def count(self) -> int:
        """The number of chunks of the incomplete blob; 0 if no chunk of it has been received."""
        return self._blob[1]

    @property
    def missing(self) -> list[int]:
        """The indices of the incomplete blob's chunks that have not been received."""
        return self._partial.missing(self.count)

    def add(self, payload: bytes) -> bytes | None:
        """The whole blob once every chunk has been received, else None.

        Raises MessageError if the payload is not a chunk of a blob of at most `max_bytes`, or if the whole blob does
        not have its SHA-256. The blob can be received again after that.
        """
        chunk = Chunk.read(payload, self._max_bytes)
        if chunk.blob != self._blob:
            self._blob, self._partial = chunk.blob, _InMemory()
        try:
            blob = self._partial.add(chunk)
        except MessageError:
            self._blob = NO_BLOB
            raise
        if blob is not None:
            self._blob = NO_BLOB
        return blob
