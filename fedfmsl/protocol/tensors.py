"""Blobs: named tensors with a header as bytes, and back.

A *blob* is a safetensors file with one JSON header in its metadata. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.errors import MessageError, one_line
from fedfmsl.protocol.messages import first_error

Header = TypeVar("Header", bound=BaseModel)

# Maximum header of a blob, with the names and shapes of its tensors. Parsed JSON takes up to 24 times as much memory.
MAX_HEADER_BYTES = 512 * 1024
MAX_TENSORS = 4096
# Of encoded values (see `fedfmsl.protocol.encoding`), and of secure sums (see `fedfmsl.protocol.secure_sums`).
DTYPES = (np.float32, np.float16, np.int8, np.uint64, np.uint8)
_DTYPES = dict(zip(("F32", "F16", "I8", "U64", "U8"), map(np.dtype, DTYPES), strict=True))  # names of safetensors


def pack(header: BaseModel, tensors: Tensors) -> bytes:
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return save(contiguous, metadata={"header": header.model_dump_json()})


def unpack(
    blob: bytes, header_type: type[Header], max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[Header, dict[str, NDArray[np.generic]]]:
    """The header, and copies of the tensors. Memory: that of the tensors and of a header of `max_header_bytes`.

    Raises MessageError unless the blob is a safetensors file with a valid header of this type and at most MAX_TENSORS
    tensors of DTYPES.
    """
    try:
        length = int.from_bytes(blob[:8], "little")
        if length > max_header_bytes:
            raise ValueError(f"its header is longer than {max_header_bytes} bytes")
        # safetensors checks the structure, and that the tensors cover each byte once, before it copies
        tensors = load(blob)
        metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
        header = header_type.model_validate_json(metadata["header"])
    except ValidationError as error:
        raise MessageError(f"not a valid {header_type.__name__} blob: {first_error(error)}") from None
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MessageError(f"not a valid {header_type.__name__} blob: {one_line(error)}") from error
    if len(tensors) > MAX_TENSORS:
        raise MessageError(f"a blob of {len(tensors)} tensors: more than {MAX_TENSORS}")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(np.dtype(each).name for each in DTYPES)
            raise MessageError(one_line(f"tensor {name!r} is {tensor.dtype}, not one of {known}"))
    return header, tensors


def tensors_of(blob: bytes) -> dict[str, NDArray[np.generic]]:
    """The tensors of a blob that `unpack` has accepted before, as views. Nothing is checked again."""
    start = 8 + int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8:start])
    del entries["__metadata__"]
    found = {}
    for name, entry in entries.items():
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        found[name] = np.frombuffer(blob, dtype, math.prod(shape), start + entry["data_offsets"][0]).reshape(shape)
    return found


def blob_bytes(values: int) -> int:
    """The maximum length of a blob with this number of values."""
    return 8 + MAX_HEADER_BYTES + 4 * values


def blob_hash(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
