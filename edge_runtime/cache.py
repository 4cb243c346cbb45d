"""Files that may be lost: a cache on disk, within a byte budget, that never gives back what was not written (ours).

What is stored carries a checksum, because after a power cut a file can have its name and its length and yet not its
content. A file that does not match is removed, as if it had never been there. Nothing here fails for want of room, on a
full disk neither: what does not fit is not kept.
"""

from __future__ import annotations

import shutil
import zlib
from collections import Counter
from enum import IntEnum
from pathlib import Path

from shell.files import FULL, write_atomically

SHARE_OF_FREE_DISK = 0.5  # what a cache may take where nobody says
BLOCK = 4096  # a file takes whole blocks of the disk
CHECKSUM = 4  # bytes, at the end of each file


class Worth(IntEnum):
    """Of a folder: what it would cost to do without it. The least goes first when room is needed."""

    AHEAD = 0  # may never be asked for
    DERIVED = 1  # quickly made out of others
    PRESENT = 2  # slow to make
    SMALL = 3  # slow to make, and takes no room to speak of


class DiskCache:
    """Named files in named folders below `root`, which belongs to this process alone."""

    def __init__(self, root: Path, budget: int | None = None) -> None:
        """`budget` in bytes of disk. Default: SHARE_OF_FREE_DISK, where what is already here counts as free."""
        self._root = root
        self._worth: dict[str, Worth] = {}
        self._asked: set[str] = set()
        self._files: dict[str, dict[str, int]] = {}  # folder → file → bytes of disk
        self._bytes: Counter[str] = Counter()  # by folder
        root.mkdir(parents=True, exist_ok=True)
        for path in root.glob("*/*"):
            if path.name.startswith("."):  # a process was ended while it wrote
                path.unlink()
            else:
                self._add(path.parent.name, path.name, _on_disk(path.stat().st_size))
        free = shutil.disk_usage(root).free + self.used
        self._budget = round(SHARE_OF_FREE_DISK * free) if budget is None else budget

    @property
    def used(self) -> int:
        """Bytes of disk."""
        return self._bytes.total()

    def ask_for(self, folder: str, worth: Worth) -> None:
        """To be called before a folder is used: others must be worth more to take its room from now on."""
        self._worth[folder] = max(worth, self._worth.get(folder, worth)) if folder in self._asked else worth
        self._asked.add(folder)

    def has(self, folder: str, name: str) -> bool:
        """Whether it was stored; only `get` looks whether it can be read."""
        return name in self._files.get(folder, {})

    def get(self, folder: str, name: str) -> bytes | None:
        """What was stored, or None if it is not here, whole and unchanged."""
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
        """Stores it if there is room, or room can be made, in the budget and on the disk."""
        self._remove(folder, name)
        if not self.room(folder, len(data)):
            return False
        size = _on_disk(len(data) + CHECKSUM)
        while self.used + size > self._budget:
            self._evict(self._rank(folder))
        while True:
            try:
                write_atomically(self._root / folder / name, data + _checksum(data))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if not self._evict(self._rank(folder)):
                    return False
            else:
                self._add(folder, name, size)
                return True

    def room(self, folder: str, length: int) -> int:
        """For how many more files of `length` bytes there is room in this folder, or can be made."""
        kept = sum(size for other, size in self._bytes.items() if self._rank(other) >= self._rank(folder))
        return max(self._budget - kept, 0) // _on_disk(length + CHECKSUM)

    def drop_unused(self) -> None:
        """Deletes every folder that nobody has asked for since the last call, and what else is over the budget."""
        for folder in self._files.keys() - self._asked:
            shutil.rmtree(self._root / folder, ignore_errors=True)
            del self._files[folder], self._bytes[folder]
        while self.used > self._budget and self._evict((True, Worth.SMALL)):
            pass
        self._asked.clear()

    def drop_others(self, names: set[str]) -> None:
        """Deletes every file that has another name than these, in every folder."""
        for folder, files in self._files.items():
            for name in files.keys() - names:
                self._remove(folder, name)

    def give_way(self) -> None:
        """Deletes everything, and from now on takes no more than its share of what is free then: somebody else needs
        the disk."""
        for folder, files in self._files.items():
            for name in list(files):
                self._remove(folder, name)
        self._budget = min(self._budget, round(SHARE_OF_FREE_DISK * shutil.disk_usage(self._root).free))

    def _rank(self, folder: str) -> tuple[bool, Worth]:
        """What nobody has asked for lately goes before what somebody has."""
        return folder in self._asked, self._worth.get(folder, Worth.AHEAD)

    def _evict(self, below: tuple[bool, Worth]) -> bool:
        """Deletes one of the files that rank lowest, if they rank below `below`."""
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
