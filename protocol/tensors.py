"""The one place that turns named tensors and their header into bytes and back, and bytes into chunks.

A *blob* is a safetensors file whose metadata carries one JSON header. A *chunk* is a slice of a blob, small enough for
the broker, that says which slice of which blob it is. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from protocol.errors import MessageError

Tensors = Mapping[str, NDArray[np.generic]]
Header = TypeVar("Header", bound=BaseModel)

CHUNK_BYTES = 96 * 1024  # AWS IoT's limit is 128 KB, the smallest of the hosted brokers'
MAX_BLOB_BYTES = 64 * 1024 * 1024
_CHUNK_HEAD = struct.Struct(">4sII32s")  # magic, index, count, SHA-256 of the blob
_MAGIC = b"FMS1"


def pack(header: BaseModel, tensors: Tensors) -> bytes:
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return save(contiguous, metadata={"header": header.model_dump_json()})


def unpack(blob: bytes, header_type: type[Header]) -> tuple[Header, dict[str, NDArray[np.generic]]]:
    """Raises MessageError if the blob is not a safetensors file with a valid header of that type."""
    try:
        tensors = load(blob)
        length = struct.unpack("<Q", blob[:8])[0]
        metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
        return header_type.model_validate_json(metadata["header"]), tensors
    except (SafetensorError, ValidationError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"not a valid {header_type.__name__} blob: {str(error).splitlines()[0]}") from error


def blob_hash(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def chunks(blob: bytes) -> Iterator[bytes]:
    """Slices of at most CHUNK_BYTES, each with its index, the count and the blob's SHA-256 in front."""
    digest = hashlib.sha256(blob).digest()
    count = max(1, -(-len(blob) // CHUNK_BYTES))
    for index in range(count):
        body = blob[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        yield _CHUNK_HEAD.pack(_MAGIC, index, count, digest) + body


class Assembler:
    """Collects the chunks of one blob, in any order, repeated or not."""

    def __init__(self) -> None:
        self._digest = b""
        self._parts: dict[int, bytes] = {}

    def add(self, chunk: bytes) -> bytes | None:
        """The whole blob once every chunk has come, else None. A chunk of another blob starts over.

        Raises MessageError if the bytes are not a chunk, or the finished blob does not have its announced SHA-256.
        """
        if len(chunk) < _CHUNK_HEAD.size:
            raise MessageError("not a chunk: too short")
        magic, index, count, digest = _CHUNK_HEAD.unpack_from(chunk)
        if magic != _MAGIC or not index < count <= MAX_BLOB_BYTES // CHUNK_BYTES:
            raise MessageError("not a chunk: unknown magic or counts out of range")
        if len(chunk) > _CHUNK_HEAD.size + CHUNK_BYTES:
            raise MessageError(f"not a chunk: longer than {CHUNK_BYTES} bytes")
        if digest != self._digest:
            self._digest, self._parts = digest, {}
        self._parts[index] = chunk[_CHUNK_HEAD.size :]
        if len(self._parts) < count:
            return None
        blob = b"".join(part for _, part in sorted(self._parts.items()))
        self._digest, self._parts = b"", {}
        if hashlib.sha256(blob).digest() != digest:
            raise MessageError("the chunks do not add up to the announced SHA-256")
        return blob
