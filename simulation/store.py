"""Where a simulation keeps the hidden states and features of all samples: one file per folder.

Virtual devices and worker processes read the same pages of the system's page cache, so a device has no copy. The files
are not mapped: pages that a process has mapped count as its memory.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.cache import Priority

DERIVED_BYTES = 2**29  # of states that depend on an expert; they are kept in memory
CRC = np.dtype("<u4")

StoredRows = tuple[Sequence[str], NDArray[np.uint8]]  # names (n,) and their bytes (n, length)


class _Store(ABC):
    """A `Store` of `edge_runtime.data.features`. States of a level that may come later are not stored, and states that
    depend on an expert only in memory, the most recently used ones within `derived_bytes`."""

    def __init__(self, derived_bytes: int) -> None:
        self._derived_bytes = derived_bytes
        self._priority: dict[str, Priority] = {}
        self._derived: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._derived_used = 0

    @abstractmethod
    def _has(self, folder: str, name: str) -> bool: ...

    @abstractmethod
    def _get(self, folder: str, name: str) -> bytes | None: ...

    @abstractmethod
    def _put(self, folder: str, name: str, data: bytes) -> bool: ...

    def use(self, folder: str, priority: Priority) -> None:
        self._priority[folder] = max(priority, self._priority.get(folder, priority))

    def has(self, folder: str, name: str) -> bool:
        return (folder, name) in self._derived or self._has(folder, name)

    def get(self, folder: str, name: str) -> bytes | None:
        if (folder, name) in self._derived:
            self._derived.move_to_end((folder, name))
            return self._derived[folder, name]
        return self._get(folder, name)

    def put(self, folder: str, name: str, data: bytes) -> bool:
        """Raises OSError if the disk is full."""
        priority = self._priority[folder]
        if priority is not Priority.DERIVED:
            return priority is not Priority.AHEAD and self._put(folder, name, data)
        self._derived_used += len(data) - len(self._derived.pop((folder, name), b""))
        self._derived[folder, name] = data
        while self._derived_used > self._derived_bytes:
            self._derived_used -= len(self._derived.popitem(last=False)[1])
        return True

    def capacity(self, folder: str, length: int) -> int:
        return self._derived_bytes // length if self._priority[folder] is Priority.DERIVED else sys.maxsize


class FileStore(_Store):
    """The states of a known list of names. All bytes of a folder have the same length.

    A name's bytes have a checksum, so that a half-written row is computed again after a crash. Several processes may
    use the same root.
    """

    def __init__(self, root: Path, names: Sequence[str], derived_bytes: int = DERIVED_BYTES) -> None:
        super().__init__(derived_bytes)
        self.names = names
        self._root = root / hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        self._root.mkdir(parents=True, exist_ok=True)
        self._rows = {name: row for row, name in enumerate(names)}
        self._tables: dict[str, _Table] = {}

    def use(self, folder: str, priority: Priority) -> None:
        if folder not in self._priority:
            path = self._root / folder
            size = path.stat().st_size if path.is_file() else 0
            if size:
                self._tables[folder] = _Table.open(path, len(self._rows), size // len(self._rows))
        super().use(folder, priority)

    def arrays(self) -> dict[str, StoredRows]:
        """What is stored in each folder so far."""
        return {
            folder: (
                [self.names[row] for row in np.flatnonzero(table.checksums).tolist()],
                table.rows()[table.checksums > 0],
            )
            for folder, table in self._tables.items()
        }

    def _has(self, folder: str, name: str) -> bool:
        row = self._rows.get(name)
        return folder in self._tables and row is not None and bool(self._tables[folder].checksums[row])

    def _get(self, folder: str, name: str) -> bytes | None:
        return self._tables[folder].get(self._rows[name]) if self._has(folder, name) else None

    def _put(self, folder: str, name: str, data: bytes) -> bool:
        if name not in self._rows:
            return False
        if folder not in self._tables:
            self._tables[folder] = _Table.open(self._root / folder, len(self._rows), len(data))
        self._tables[folder].put(self._rows[name], data)
        return True


class ArrayStore(_Store):
    """The `arrays` of a `FileStore` on another machine. Nothing is added to them."""

    def __init__(self, arrays: Mapping[str, StoredRows], derived_bytes: int = DERIVED_BYTES) -> None:
        super().__init__(derived_bytes)
        self._arrays = {
            folder: ({name: row for row, name in enumerate(names)}, rows) for folder, (names, rows) in arrays.items()
        }

    def _has(self, folder: str, name: str) -> bool:
        return folder in self._arrays and name in self._arrays[folder][0]

    def _get(self, folder: str, name: str) -> bytes | None:
        if not self._has(folder, name):
            return None
        index, rows = self._arrays[folder]
        data: bytes = rows[index[name]].tobytes()
        return data

    def _put(self, folder: str, name: str, data: bytes) -> bool:
        return False


@dataclass(frozen=True)
class _Table:
    """A file of n rows of `length` bytes. `checksums` (n,): 0 for a row that is not stored; other processes add some.
    `checked` (n,): rows that this process has compared with their checksum.
    """

    path: Path
    file: BinaryIO
    length: int
    checksums: NDArray[np.uint32]
    checked: NDArray[np.bool_]

    @classmethod
    def open(cls, path: Path, count: int, length: int) -> _Table:
        """Creates missing files, with holes: only stored rows take space."""
        checksums = path.with_suffix(".crc")
        for file, size in ((path, count * length), (checksums, count * CRC.itemsize)):
            with file.open("ab") as opened:
                opened.truncate(size)
        return cls(
            path,
            path.open("rb"),
            length,
            np.asarray(np.memmap(checksums, CRC, "r", shape=(count,))),  # an array is indexed faster
            np.zeros(count, bool),
        )

    def get(self, row: int) -> bytes | None:
        data = os.pread(self.file.fileno(), self.length, row * self.length)
        if not self.checked[row]:
            if self.checksums[row] != _checksum(data):
                return None
            self.checked[row] = True
        return data

    def rows(self) -> NDArray[np.uint8]:
        """All rows (n, length)."""
        return np.memmap(self.path, np.uint8, "r", shape=(len(self.checksums), self.length))

    def put(self, row: int, data: bytes) -> None:
        _write(self.path, row * len(data), data)
        _write(self.path.with_suffix(".crc"), row * CRC.itemsize, _checksum(data).to_bytes(CRC.itemsize, "little"))


def _write(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if os.pwrite(descriptor, data, offset) < len(data):
            raise OSError(errno.ENOSPC, f"no space for {path}")
    finally:
        os.close(descriptor)


def _checksum(data: bytes) -> int:
    """CRC-32, and 1 instead of 0."""
    return zlib.crc32(data) or 1
