"""The chunks of updates on their way in, collected on disk: memory does not grow with what is unfinished.

UPLOADS/N                the N-th blob that was begun, its chunks at their places

Nothing here survives a restart: what was unfinished is sent again by its device.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from fedfmsl.common.files import sync
from fedfmsl.errors import MessageError
from fedfmsl.protocol.chunks import CHUNK_BYTES, Chunk, PartialBlob

PARTIALS = 2  # of one device: a late update may cross the next round's
SYNCS = 8  # of files at once


@dataclass(frozen=True)
class Upload:
    """A whole blob, and the file it lies in. `size`: the bytes it took on the wire, chunks sent twice included."""

    path: Path
    blob: bytes
    sha256: str
    size: int


@dataclass(slots=True)
class _InFile(PartialBlob):
    """`size`: the bytes it took on the wire."""

    path: Path
    size: int = 0

    def _write(self, index: int, body: bytes) -> None:
        with self.path.open("r+b" if self._received else "wb") as file:
            file.seek(index * CHUNK_BYTES)
            file.write(body)

    def _read(self) -> bytes:
        return self.path.read_bytes()


_Blob = tuple[int, bytes, int]  # round, SHA-256, number of chunks


class Uploads:
    """At most PARTIALS unfinished blobs of each device; of more, the one that has rested longest gives way."""

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        """`folder` belongs to these uploads alone and is emptied; a blob of more than `cap_bytes` is refused."""
        self._folder = folder
        self._cap_bytes = cap_bytes
        self._numbers = count()
        self._syncs = ThreadPoolExecutor(SYNCS)
        self._partials: dict[str, dict[_Blob, _InFile]] = {}  # by device, the one that has rested longest first
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()

    def add(self, device: str, round_: int, payload: bytes) -> Upload | None:
        """The whole blob once every chunk of it has come, in any order, repeated or not; else None. It is the caller's
        to `store` or to `discard`.

        Raises MessageError if the payload is not a chunk of a blob that is expected here, or the finished blob does
        not have its announced SHA-256; OSError if it cannot be written. What was collected of the blob is gone then
        (on a full disk it would only be in the way of others), and can be sent again.
        """
        chunk = Chunk.read(payload, self._cap_bytes)
        blob = (round_, chunk.digest, chunk.count)
        partial = self._take(device, blob)
        partial.size += len(payload)
        try:
            whole = partial.add(chunk)
        except (OSError, MessageError):
            partial.path.unlink(missing_ok=True)
            raise
        if whole is None:
            self._put_back(device, blob, partial)
            return None
        return Upload(partial.path, whole, chunk.digest.hex(), partial.size)

    def store(self, files: Mapping[Path, Path]) -> None:
        """Moves the files of whole blobs to their targets, on the same disk; they survive a power cut from now on. They
        go together, because a disk takes hardly longer to sync many files at once than one. Raises OSError."""
        list(self._syncs.map(sync, files))
        for path, target in files.items():
            path.replace(target)
        for folder in {target.parent for target in files.values()}:
            sync(folder)

    @staticmethod
    def discard(upload: Upload) -> None:
        upload.path.unlink(missing_ok=True)

    def _take(self, device: str, blob: _Blob) -> _InFile:
        """The partial blob, which nobody but the caller has from now on."""
        partials = self._partials.get(device, {})
        partial = partials.pop(blob, None)
        if not partials:
            self._partials.pop(device, None)
        return partial or _InFile(self._folder / str(next(self._numbers)))

    def _put_back(self, device: str, blob: _Blob, partial: _InFile) -> None:
        """Puts it back, as the one that has been gone on with last."""
        partials = self._partials.setdefault(device, {})
        partials[blob] = partial
        if len(partials) > PARTIALS:
            partials.pop(next(iter(partials))).path.unlink()
