"""The tensors of a run: those of its checkpoints and its start, each in a file, and those of accepted updates.

RUN/tensors/SHA256   the checkpoint's tensors, and what the run goes on from
RUN/tensors/updates-N  the updates accepted after it (see `trainer_server.storage.update_files`)
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.common.files import EXHAUSTED, FAILING, write_atomically
from fedfmsl.errors import MessageError, RunError
from fedfmsl.protocol.tensors import Header, blob_hash, tensors_of, unpack
from trainer_server.storage.update_files import Place, UpdateFiles


class RunBlobs:
    """The table `blobs` says where those of updates are. All methods may raise sqlite3.Error and OSError."""

    def __init__(self, folder: Path, database: sqlite3.Connection) -> None:
        self.folder = folder
        self.updates = UpdateFiles(folder)
        self._db = database
        self._verified: dict[str, Place] = {}  # by SHA-256, where blobs are that this process has written or read

    def read(self, sha256: str) -> Tensors:
        """The tensors of an accepted update or a kept global expert. Raises RunError if its file is missing or altered,
        OSError if no file can be opened or the disk fails."""
        return tensors_of(self._blob(sha256))

    def unpack(self, sha256: str, header_type: type[Header]) -> tuple[Header, Tensors]:
        """The same, with the blob's header."""
        try:
            return unpack(self._blob(sha256), header_type)
        except MessageError as error:
            raise RunError(f"{self.folder / sha256}: {error}") from error

    def _blob(self, sha256: str) -> bytes:
        place = verified = self._verified.get(sha256)
        if place is None:
            row = self._db.execute("SELECT file, start, size FROM blobs WHERE sha256 = ?", (sha256,)).fetchone()
            place = Place(*row) if row else None
        path = self.folder / (UpdateFiles.name(place.file) if place else sha256)
        try:
            blob = self.updates.read(place) if place else path.read_bytes()
        except OSError as error:
            if error.errno in EXHAUSTED | FAILING:  # not this file alone: it may be read later
                raise
            raise RunError(f"{path} cannot be read ({error.strerror}); restore it from a backup") from error
        if not (len(blob) == verified.size if verified else blob_hash(blob) == sha256):
            raise RunError(f"{path} was altered (wrong SHA-256); restore it from a backup")
        if place:
            self._verified[sha256] = place
        return blob

    def write(self, blob: bytes) -> str:
        """Writes a blob into a file of its own, durably, and returns its SHA-256."""
        sha256 = blob_hash(blob)
        write_atomically(self.folder / sha256, blob, durable=True)
        return sha256

    def place(self, places: Mapping[str, Place]) -> None:
        """Stores where blobs of updates are that this process has written, by SHA-256, within a transaction of the
        caller."""
        rows = [(sha256, *place) for sha256, place in places.items()]
        self._db.executemany("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, ?)", rows)
        self._verified.update(places)

    def begin(self) -> None:
        """Later updates go to a new file."""
        self.updates.begin()
        self._verified.clear()

    def sweep(self, needed: Iterable[str]) -> None:
        """Deletes the files without a `needed` blob, given by SHA-256, and without an update that the table names."""
        kept = {*needed, *(UpdateFiles.name(file) for (file,) in self._db.execute("SELECT DISTINCT file FROM blobs"))}
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)
