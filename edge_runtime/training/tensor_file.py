"""Reads the files of tensors with a header that a device writes for itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.errors import MessageError
from fedfmsl.protocol.tensors import Header, unpack


def read_tensors(path: Path, header_type: type[Header], names: Sequence[str]) -> tuple[Header, list[Vector]] | None:
    """The header and the tensors `names` of a file that `pack` made. None if the file is missing or damaged."""
    try:
        header, tensors = unpack(path.read_bytes(), header_type)
        return header, [np.asarray(tensors[name], np.float32) for name in names]
    except (OSError, MessageError, KeyError):
        return None
