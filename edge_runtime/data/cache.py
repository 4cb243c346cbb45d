"""A cache on disk within a byte budget (ours). Its files may be lost, but a damaged file is never returned.

Every file ends with a checksum, because after a power cut a file can have its name and length but not its content. A
file that does not match is deleted. Some of the disk stays free for other programs. Nothing fails because the disk is
full: a file that does not fit is not stored.
"""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections import Counter
from enum import IntEnum
from pathlib import Path
from typing import TypeAlias

from fedfmsl.common.files import FULL, write_atomically

SHARE_OF_FREE_DISK = 0.5  # the default budget
BLOCK = 4096  # bytes; a file occupies whole blocks
CHECKSUM = 4  # bytes at the end of each file


class Priority(IntEnum):
    """The priority of a folder. Files of the lowest priority are deleted first."""

    AHEAD = 0  # computed before it is needed
    DERIVED = 1  # quickly computed from other files
    PRESENT = 2  # slow to compute
    SMALL = 3  # slow to compute, and small


Rank: TypeAlias = tuple[bool, int]  # of a folder: used since `drop_unused`, priority
ABOVE_ALL: Rank = (True, len(Priority))


class DiskCache:
    """Named files in named folders below `root`. One process uses `root` at a time."""

    def __init__(self, root: Path, budget: int | None = None, keep_free: int = 0) -> None:
        """`budget` in bytes of disk. Default: SHARE_OF_FREE_DISK of the free disk with the cache empty. The last
        `keep_free` bytes of the disk are never used."""
        self._root = root
        self._keep_free = keep_free
        self._priority: dict[str, Priority] = {}
        self._in_use: set[str] = set()
        self._files: dict[str, dict[str, int]] = {}  # folder → file → bytes of disk
        self._bytes: Counter[str] = Counter()  # by folder
        root.mkdir(parents=True, exist_ok=True)
        for path in root.glob("*/*"):
            if path.name.startswith("."):  # the temporary file of a process that was killed
                path.unlink()
            else:
                self._add(path.parent.name, path.name, _on_disk(path.stat().st_size))
        free = shutil.disk_usage(root).free + self.used
        self._budget = round(SHARE_OF_FREE_DISK * free) if budget is None else budget

    @property
    def used(self) -> int:
        """Bytes of disk."""
        return self._bytes.total()

    def use(self, folder: str, priority: Priority) -> None:
        """Marks a folder as used. Call it before reading or writing the folder's files."""
        used = folder in self._in_use
        self._priority[folder] = max(priority, self._priority.get(folder, priority)) if used else priority
        self._in_use.add(folder)

    def has(self, folder: str, name: str) -> bool:
        """Whether the file was stored. Only `get` checks its content."""
        return name in self._files.get(folder, {})

    def get(self, folder: str, name: str) -> bytes | None:
        """The stored bytes; None if the file does not exist or is damaged."""
        if not self.has(folder, name):
            return None
        try:
            stored = (self._root / folder / name).read_bytes()
        except OSError:
            stored = b""
        data, checksum = stored[:-CHECKSUM], stored[-CHECKSUM:]
        if checksum == _checksum(data):
            return data
        self._remove(folder, name)
        return None

    def put(self, folder: str, name: str, data: bytes) -> bool:
        """Stores a file, and deletes files of lower rank if they are in the way. False if it does not fit."""
        self._remove(folder, name)
        if not self.capacity(folder, len(data)):
            return False
        size = _on_disk(len(data) + CHECKSUM)
        self._evict(max(self.used + size - self._budget, size - self._spare()), self._rank(folder))
        while True:
            try:
                write_atomically(self._root / folder / name, data + _checksum(data))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if not self._evict_one(self._rank(folder)):
                    return False
            else:
                self._add(folder, name, size)
                return True

    def capacity(self, folder: str, length: int) -> int:
        """How many more files of `length` bytes fit in this folder, with all files of lower rank deleted."""
        kept = sum(size for other, size in self._bytes.items() if self._rank(other) >= self._rank(folder))
        available = min(self._budget - kept, self._spare() + self.used - kept)
        return max(available, 0) // _on_disk(length + CHECKSUM)

    def drop_unused(self) -> None:
        """Deletes every folder that was not used since the last call, then what exceeds the budget."""
        for folder in self._files.keys() - self._in_use:
            shutil.rmtree(self._root / folder, ignore_errors=True)
            del self._files[folder], self._bytes[folder]
        self._evict(self.used - self._budget, (True, Priority.SMALL))
        self._in_use.clear()

    def keep_free(self) -> None:
        """Deletes files, lowest rank first, until `keep_free` bytes of the disk are free."""
        with contextlib.suppress(OSError):  # a disk can become read-only
            self._evict(-self._spare(), ABOVE_ALL)

    def drop_others(self, names: set[str]) -> None:
        """Deletes every file with another name than these, in every folder."""
        for folder, files in self._files.items():
            for name in files.keys() - names:
                self._remove(folder, name)

    def evict_all(self) -> None:
        """Deletes everything, and lowers the budget to SHARE_OF_FREE_DISK of what is free then."""
        for folder, files in self._files.items():
            for name in list(files):
                self._remove(folder, name)
        self._budget = min(self._budget, round(SHARE_OF_FREE_DISK * shutil.disk_usage(self._root).free))

    def _rank(self, folder: str) -> Rank:
        return folder in self._in_use, self._priority.get(folder, Priority.AHEAD)

    def _spare(self) -> int:
        """Free bytes of the disk beyond `keep_free`."""
        return shutil.disk_usage(self._root).free - self._keep_free

    def _evict(self, size: int, below: Rank) -> None:
        """Deletes at least `size` bytes, if there are as many below that rank. Counts sizes itself, because some file
        systems report free space late."""
        target = self.used - size
        while self.used > target and self._evict_one(below):
            pass

    def _evict_one(self, below: Rank) -> bool:
        """Deletes a file of the lowest rank, if that is below `below`."""
        folder = min((folder for folder, files in self._files.items() if files), key=self._rank, default=None)
        if folder is None or self._rank(folder) >= below:
            return False
        self._remove(folder, next(iter(self._files[folder])))
        return True

    def _add(self, folder: str, name: str, size: int) -> None:
        self._files.setdefault(folder, {})[name] = size
        self._bytes[folder] += size

    def _remove(self, folder: str, name: str) -> None:
        size = self._files.get(folder, {}).pop(name, None)
        if size is not None:
            self._bytes[folder] -= size
            (self._root / folder / name).unlink(missing_ok=True)


def _on_disk(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(CHECKSUM, "big")
