"""`MappedStore`: the hidden states and features of all samples of a simulation, one memory-mapped file per folder.

Virtual devices and worker processes read the same pages of the system's page cache, so a device has no copy.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data.cache import Priority

DERIVED_BYTES = 2**29  # of states that depend on an expert; they are kept in memory
CRC = np.dtype("<u4")


class MappedStore:
    """A `Store` of `edge_runtime.data.features` for a known list of names, in which all bytes of a folder have the same
    length.

    A name's bytes have a checksum, so that a half-written row is computed again after a crash. Several processes may
    use the same root. States of a level that may come later are not stored, and states that depend on an expert only
    in memory, the most recently used ones within `derived_bytes`.
    """

    def __init__(self, root: Path, names: Sequence[str], derived_bytes: int = DERIVED_BYTES) -> None:
        self._root = root / hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        self._root.mkdir(parents=True, exist_ok=True)
        self._names = {name: row for row, name in enumerate(names)}
        self._derived_bytes = derived_bytes
        self._priority: dict[str, Priority] = {}
        self._tables: dict[str, _Table] = {}
        self._derived: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._derived_used = 0

    def use(self, folder: str, priority: Priority) -> None:
        if folder in self._priority:
            self._priority[folder] = max(priority, self._priority[folder])
            return
        self._priority[folder] = priority
        path = self._root / folder
        size = path.stat().st_size if path.is_file() else 0
        if size:
            self._tables[folder] = _Table.open(path, len(self._names), size // len(self._names))

    def has(self, folder: str, name: str) -> bool:
        if (folder, name) in self._derived:
            return True
        row = self._names.get(name)
        return folder in self._tables and row is not None and bool(self._tables[folder].checksums[row])

    def get(self, folder: str, name: str) -> bytes | None:
        if (folder, name) in self._derived:
            self._derived.move_to_end((folder, name))
            return self._derived[folder, name]
        return self._tables[folder].get(self._names[name]) if self.has(folder, name) else None

    def put(self, folder: str, name: str, data: bytes) -> bool:
        """Raises OSError if the disk is full."""
        priority = self._priority[folder]
        if priority is Priority.DERIVED:
            self._put_derived(folder, name, data)
            return True
        if priority is Priority.AHEAD or name not in self._names:
            return False
        if folder not in self._tables:
            self._tables[folder] = _Table.open(self._root / folder, len(self._names), len(data))
        self._tables[folder].put(self._names[name], data)
        return True

    def capacity(self, folder: str, length: int) -> int:
        return self._derived_bytes // length if self._priority[folder] is Priority.DERIVED else len(self._names)

    def _put_derived(self, folder: str, name: str, data: bytes) -> None:
        self._derived_used += len(data) - len(self._derived.pop((folder, name), b""))
        self._derived[folder, name] = data
        while self._derived_used > self._derived_bytes:
            self._derived_used -= len(self._derived.popitem(last=False)[1])


@dataclass(frozen=True)
class _Table:
    """`rows` (n, length) of bytes. `checksums` (n,): 0 for a row that is not stored. `checked` (n,): rows that this
    process has compared with their checksum.

    Rows are written with `pwrite`, because a write to a mapped page would kill the process on a full disk.
    """

    path: Path
    rows: NDArray[np.uint8]
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
            np.asarray(np.memmap(path, np.uint8, "r", shape=(count, length))),  # an array is indexed faster
            np.asarray(np.memmap(checksums, CRC, "r", shape=(count,))),
            np.zeros(count, bool),
        )

    def get(self, row: int) -> bytes | None:
        data: bytes = self.rows[row].tobytes()
        if not self.checked[row]:
            if self.checksums[row] != _checksum(data):
                return None
            self.checked[row] = True
        return data

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
