"""The one place that turns named tensors and their header into bytes and back.

A *blob* is a safetensors file whose metadata carries one JSON header. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
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

MAX_HEADER_BYTES = (
    512 * 1024
)  # of a blob, names and shapes of its tensors included: parsed, JSON takes up to 24 times that
MAX_TENSORS = 4096
DTYPES = (np.float32, np.float16, np.int8)  # what values travel as (see `fedfmsl.protocol.encoding`)


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
