"""A matrix whose rows are read once, and whose columns are needed block by block.

with stored_rows(len(readers), width, MEMORY_BYTES, folder) as rows:
    for reader in readers:
        rows.append(reader())
    values = rows.block([0, 2, 5], slice(100, 200))
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedfmsl.algorithms.arrays import Floats, Vector

_BYTES = 4  # of a value


class StoredRows(ABC):
    @abstractmethod
    def append(self, row: Vector) -> None:
        """Adds a row (n,) of at most the width of the matrix. Raises OSError if it cannot be written."""

    @abstractmethod
    def read(self, row: int, columns: slice) -> Vector:
        """These columns of a row. The values must have been appended."""

    def block(self, rows: Sequence[int], columns: slice) -> Floats:
        """A copy of these columns of these rows, transposed (columns, rows)."""
        values = np.empty((columns.stop - columns.start, len(rows)), np.float32)
        for index, row in enumerate(rows):
            values[:, index] = self.read(row, columns)
        return values


@contextmanager
def stored_rows(count: int, width: int, memory_bytes: int, folder: Path | None = None) -> Iterator[StoredRows]:
    """A matrix of `count` rows of at most `width` values.

    If it takes more than `memory_bytes`, it is in a file in `folder`; None: that of temporary files. The file has no
    name, so that nothing of it remains after a crash. Raises OSError if it cannot be made.
    """
    if count * width * _BYTES <= memory_bytes:
        yield _InMemory(count, width)
        return
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        yield _InFile(file.fileno(), width)


class _InMemory(StoredRows):
    def __init__(self, count: int, width: int) -> None:
        self._matrix = np.empty((count, width), np.float32)
        self._count = 0

    def append(self, row: Vector) -> None:
        self._matrix[self._count, : row.size] = row
        self._count += 1

    def read(self, row: int, columns: slice) -> Vector:
        return self._matrix[row, columns]


class _InFile(StoredRows):
    def __init__(self, descriptor: int, width: int) -> None:
        self._descriptor = descriptor
        self._bytes = width * _BYTES
        self._count = 0

    def append(self, row: Vector) -> None:
        left, offset = memoryview(row.astype(np.float32, copy=False).tobytes()), self._count * self._bytes
        while left:
            written = os.pwrite(self._descriptor, left, offset)
            left, offset = left[written:], offset + written
        self._count += 1

    def read(self, row: int, columns: slice) -> Vector:
        size = (columns.stop - columns.start) * _BYTES
        return np.frombuffer(os.pread(self._descriptor, size, row * self._bytes + columns.start * _BYTES), np.float32)
