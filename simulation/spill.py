"""What a simulation keeps for all devices at once: on disk, so that memory does not grow with their number.

The files are in a temporary folder (TMPDIR), which is removed with the last object that uses it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import count
from pathlib import Path
from weakref import finalize

import numpy as np

from fedfmsl.algorithms.arrays import Floats, Tensors
from fedfmsl.protocol.messages import Update
from fedfmsl.protocol.tensors import unpack


class Folder:
    """A temporary folder, created when it is first used."""

    def __init__(self) -> None:
        self._numbers = count()

    @cached_property
    def path(self) -> Path:
        path = Path(tempfile.mkdtemp(prefix="fedfmsl-simulation-"))
        finalize(self, shutil.rmtree, path, ignore_errors=True)
        return path

    def new_file(self) -> Path:
        """The path of a file that does not exist yet."""
        return self.path / str(next(self._numbers))


class _Stored:
    """An array in a file, which is removed with this object."""

    def __init__(self, folder: Folder, array: Floats) -> None:
        self.folder = folder
        self._path = folder.new_file()
        with self._path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        finalize(self, self._path.unlink, missing_ok=True)

    def load(self) -> Floats:
        array: Floats = np.load(self._path, allow_pickle=False)
        return array


class StoredArrays(Mapping[str, Floats]):
    """An immutable mapping from devices to arrays on disk. A copy of an array is read at each use."""

    def __init__(self, arrays: Iterable[tuple[str, Floats]] = ()) -> None:
        self._folder = Folder()
        self._stored = {name: _Stored(self._folder, array) for name, array in arrays}

    def updated(self, arrays: Iterable[tuple[str, Floats]]) -> StoredArrays:
        """The mapping with other arrays for some devices, of which one at a time is in memory."""
        updated = StoredArrays.__new__(StoredArrays)
        updated._folder = self._folder
        updated._stored = {**self._stored, **{name: _Stored(self._folder, array) for name, array in arrays}}
        return updated

    def __getitem__(self, name: str) -> Floats:
        return self._stored[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class StoredUpdates:
    """The updates of a round, by the SHA-256 of their blobs."""

    def __init__(self) -> None:
        self._folder = Folder()

    def add(self, sha256: str, blob: bytes) -> None:
        (self._folder.path / sha256).write_bytes(blob)

    def read(self, sha256: str) -> Tensors:
        return unpack((self._folder.path / sha256).read_bytes(), Update)[1]

    def clear(self) -> None:
        for path in self._folder.path.iterdir():
            path.unlink()
