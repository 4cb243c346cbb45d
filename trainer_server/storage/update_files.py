"""Blobs of accepted updates, one after the other in a file (ours).

    TENSORS/updates-N        the N-th file; run.sqlite has file, position and length of each blob

A file for each of ten thousand updates of a round costs more time than all else that the server does with them. A
checkpoint begins a new file, so that the file of the round before can be deleted as a whole. What a batch that was not
committed has written is never read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from fedfmsl.common.files import sync

_FILE = re.compile("updates-([0-9]+)")


class Place(NamedTuple):
    """Where a blob is: number of the file, first byte and length."""

    file: int
    start: int
    size: int


class UpdateFiles:
    """Appends blobs and reads them. All methods raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: _Open | None = None  # the file that is appended to
        self._read: _Open | None = None

    def append(self, blob: bytes) -> Place:
        """Writes a blob, which survives a power failure only after `sync`."""
        if self._written is None:
            number = max(self._numbers(), default=0) + 1
            self._written = _Open(number, os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
            sync(self._folder)
        file, left, at = self._written, memoryview(blob), self._written.size
        while left:
            written = os.pwrite(file.descriptor, left, at)
            left, at = left[written:], at + written
        place = Place(file.number, file.size, len(blob))
        file.size = at
        return place

    def sync(self) -> None:
        """All blobs survive a power failure after this call. If it fails, later blobs go to a new file: a second sync
        of the same file may succeed without what the first one could not write."""
        if self._written is not None:
            try:
                os.fsync(self._written.descriptor)
            except OSError:
                self.begin()
                raise

    def read(self, place: Place) -> bytes:
        """The bytes at a place; fewer if the file is shorter."""
        if self._read is None or self._read.number != place.file or not os.fstat(self._read.descriptor).st_nlink:
            # another one, or a deleted one whose number is used again
            descriptor = os.open(self._path(place.file), os.O_RDONLY)
            self._close(self._read)
            self._read = _Open(place.file, descriptor)
        return os.pread(self._read.descriptor, place.size, place.start)

    def begin(self) -> None:
        """Later blobs go to a new file."""
        self.close()

    def close(self) -> None:
        self._close(self._written)
        self._close(self._read)
        self._written = self._read = None

    @staticmethod
    def name(number: int) -> str:
        return f"updates-{number}"

    def _path(self, number: int) -> Path:
        return self._folder / self.name(number)

    def _numbers(self) -> list[int]:
        found = [_FILE.fullmatch(path.name) for path in self._folder.iterdir()]
        return [int(match[1]) for match in found if match]

    @staticmethod
    def _close(file: _Open | None) -> None:
        if file is not None:
            os.close(file.descriptor)


class _Open:
    """An open file. `size`: bytes of its whole blobs."""

    def __init__(self, number: int, descriptor: int) -> None:
        self.number, self.descriptor, self.size = number, descriptor, 0
