"""Files that may be lost: a cache on disk, within a byte budget, that never gives back what was not written (ours).

It also keeps some of the disk free for whoever else needs it, and gives up what it has when that gets scarce.

What is stored carries a checksum, because after a power cut a file can have its name and its length and yet not its
content. A file that does not match is removed, as if it had never been there. Nothing here fails for want of room, on a
full disk neither: what does not fit is not kept.
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

SHARE_OF_FREE_DISK = 0.5  # what a cache may take where nobody says
BLOCK = 4096  # a file takes whole blocks of the disk
CHECKSUM = 4  # bytes, at the end of each file


class Worth(IntEnum):
    """Of a folder: what it would cost to do without it. The least goes first when room is needed."""

    AHEAD = 0  # may never be asked for
    DERIVED = 1  # quickly made out of others
    PRESENT = 2  # slow to make
    SMALL = 3  # slow to make, and takes no room to speak of


Rank: TypeAlias = tuple[bool, int]  # of a folder: whether it has been asked for lately, and its worth
EVERYTHING: Rank = (True, len(Worth))  # ranks below this


class DiskCache:
    """Named files in named folders below `root`, which belongs to this process alone."""

    def __init__(self, root: Path, budget: int | None = None, keep_free: int = 0) -> None:
        """`budget` in bytes of disk. Default: SHARE_OF_FREE_DISK, where what is already here counts as free. The
        last `keep_free` bytes of the disk are never taken."""
        self._root = root
        self._keep_free = keep_free
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
        self._make_room(max(self.used + size - self._budget, size - self._spare()), self._rank(folder))
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
        room = min(self._budget - kept, self._spare() + self.used - kept)
        return max(room, 0) // _on_disk(length + CHECKSUM)

    def drop_unused(self) -> None:
        """Deletes every folder that nobody has asked for since the last call, and what else is over the budget."""
        for folder in self._files.keys() - self._asked:
            shutil.rmtree(self._root / folder, ignore_errors=True)
            del self._files[folder], self._bytes[folder]
        self._make_room(self.used - self._budget, (True, Worth.SMALL))
        self._asked.clear()

    def keep_free(self) -> None:
        """Deletes as much as is missing from what the disk has to keep free, what is worth least first."""
        with contextlib.suppress(OSError):  # a disk that has become read-only, which somebody may mend
            self._make_room(-self._spare(), EVERYTHING)

    def drop_others(self, names: set[str]) -> None:
        """Deletes every file that has another name than these, in every folder."""
        for folder, files in self._files.items():
            for name in files.keys() - names:
                self._remove(folder, name)

    def evict_all(self) -> None:
        """Deletes everything, and from now on takes no more than its share of what is free then: somebody else needs
        the disk."""
        for folder, files in self._files.items():
            for name in list(files):
                self._remove(folder, name)
        self._budget = min(self._budget, round(SHARE_OF_FREE_DISK * shutil.disk_usage(self._root).free))

    def _rank(self, folder: str) -> Rank:
        """What nobody has asked for lately goes before what somebody has."""
        return folder in self._asked, self._worth.get(folder, Worth.AHEAD)

    def _spare(self) -> int:
        """Bytes that are free beyond those that have to be."""
        return shutil.disk_usage(self._root).free - self._keep_free

    def _make_room(self, size: int, below: Rank) -> None:
        """Evicts at least `size` bytes, if there are as many that rank below. What a file gives back is reckoned, not
        looked up: some file systems are slow to say."""
        wanted = self.used - size
        while self.used > wanted and self._evict(below):
            pass

    def _evict(self, below: Rank) -> bool:
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
