"""The one place that turns named tensors and their header into bytes and back, and bytes into chunks.

A *blob* is a safetensors file whose metadata carries one JSON header. A *chunk* is a slice of a blob, small enough for
the broker, that says which slice of which blob it is. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedfmsl.algorithms.arrays import Tensors as Tensors
from fedfmsl.errors import MessageError, one_line
from fedfmsl.protocol.messages import first_of

Header = TypeVar("Header", bound=BaseModel)

CHUNK_BYTES = 96 * 1024  # AWS IoT's limit is 128 KB, the smallest of the hosted brokers'
MAX_BLOB_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = (
    512 * 1024
)  # of a blob, names and shapes of its tensors included: parsed, JSON takes up to 24 times that
MAX_TENSORS = 4096
DTYPES = (np.float32, np.float16, np.int8)  # what values travel as (see `fedfmsl.protocol.encoding`)
_CHUNK_HEAD = struct.Struct(">4sII32s")  # magic, index, count, SHA-256 of the blob
_MAGIC = b"FMS1"


def pack(header: BaseModel, tensors: Tensors) -> bytes:
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return save(contiguous, metadata={"header": header.model_dump_json()})


def unpack(blob: bytes, header_type: type[Header]) -> tuple[Header, dict[str, NDArray[np.generic]]]:
    """The header, and the tensors as copies.

    Takes no more memory than the tensors do, besides what MAX_HEADER_BYTES bounds. Raises MessageError if the blob is
    not a safetensors file with a valid header of that type and at most MAX_TENSORS tensors of DTYPES.
    """
    try:
        length = int.from_bytes(blob[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header would be longer than {MAX_HEADER_BYTES} bytes")
        # safetensors first: it refuses what is not of its form, or does not cover every byte once, before it copies
        tensors = load(blob)
        metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
        header = header_type.model_validate_json(metadata["header"])
    except ValidationError as error:
        raise MessageError(f"not a valid {header_type.__name__} blob: {first_of(error)}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MessageError(f"not a valid {header_type.__name__} blob: {one_line(error)}") from error
    if len(tensors) > MAX_TENSORS:
        raise MessageError(f"a blob of {len(tensors)} tensors: more than {MAX_TENSORS}")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise MessageError(one_line(f"tensor {name!r} is {tensor.dtype}: not a type that values travel as"))
    return header, tensors


def blob_bytes(values: int) -> int:
    """The most that a blob with so many values can be long."""
    return 8 + MAX_HEADER_BYTES + 4 * values


def blob_hash(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def chunks(blob: bytes) -> Iterator[bytes]:
    """Slices of CHUNK_BYTES, the last of what is left; in front of each its index, the count and the blob's SHA-256."""
    digest = hashlib.sha256(blob).digest()
    count = chunk_count(len(blob))
    for index in range(count):
        body = blob[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        yield _CHUNK_HEAD.pack(_MAGIC, index, count, digest) + body


def chunk_count(length: int) -> int:
    """Of a blob of `length` bytes."""
    return -(-length // CHUNK_BYTES)


@dataclass(frozen=True)
class Chunk:
    """Slice `index` of the `count` slices of the blob with the SHA-256 `digest`."""

    index: int
    count: int
    digest: bytes
    body: bytes

    @classmethod
    def read(cls, payload: bytes, cap_bytes: int) -> Chunk:
        """Raises MessageError if the payload is not a chunk, or its blob would need more chunks than one of `cap_bytes`
        does (and never more than one of MAX_BLOB_BYTES)."""
        if len(payload) < _CHUNK_HEAD.size:
            raise MessageError("not a chunk: too short")
        magic, index, count, digest = _CHUNK_HEAD.unpack_from(payload)
        if magic != _MAGIC or index >= count:
            raise MessageError("not a chunk: unknown magic or counts out of range")
        if count > chunk_count(min(cap_bytes, MAX_BLOB_BYTES)):
            raise MessageError(
                f"a chunk of a blob of {count} chunks: more than {cap_bytes} bytes are not expected here"
            )
        length = len(payload) - _CHUNK_HEAD.size
        if not (length == CHUNK_BYTES or (index == count - 1 and 0 < length < CHUNK_BYTES)):
            raise MessageError(f"not a chunk: {length} bytes as number {index + 1} of {count}")
        return cls(index, count, digest, payload[_CHUNK_HEAD.size :])


class Assembler:
    """Collects the chunks of one blob of at most `cap_bytes`, in any order, repeated or not."""

    def __init__(self, cap_bytes: int) -> None:
        self._cap_bytes = cap_bytes
        self._blob = (b"", 0)  # SHA-256 and number of chunks
        self._parts: dict[int, bytes] = {}

    def add(self, payload: bytes) -> bytes | None:
        """The whole blob once every chunk has come, else None. A chunk of another blob starts over.

        Raises MessageError if the bytes are not a chunk of such a blob, or the finished blob does not have its
        announced SHA-256.
        """
        chunk = Chunk.read(payload, self._cap_bytes)
        if (chunk.digest, chunk.count) != self._blob:
            self._blob, self._parts = (chunk.digest, chunk.count), {}
        self._parts[chunk.index] = chunk.body
        if len(self._parts) < chunk.count:
            return None
        blob = b"".join(part for _, part in sorted(self._parts.items()))
        self._blob, self._parts = (b"", 0), {}
        if hashlib.sha256(blob).digest() != chunk.digest:
            raise MessageError("the chunks do not add up to the announced SHA-256")
        return blob
