"""Collects the chunks of updates in files, so that unfinished updates need no memory.

UPLOADS/N                the N-th blob, with each received chunk at its offset

The folder is emptied at every start, because devices retransmit unfinished updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from fedfmsl.common.backoff import GAP, Backoff, Timeout
from fedfmsl.common.files import sync
from fedfmsl.errors import MessageError
from fedfmsl.protocol.chunks import Chunk, PartialBlob

PARTIALS = 2  # of one device: a late update and one of the next round
SYNCS = 8  # files that are synced at the same time
GAP_CHUNKS = 16  # asked for at once; a broker that has dropped chunks may drop more of a burst


@dataclass(frozen=True)
class Upload:
    """A complete blob and its file. `size` is its bytes on the wire, including repeated chunks."""

    path: Path
    blob: bytes
    sha256: str
    size: int


@dataclass(slots=True)
class _InFile(PartialBlob):
    """`size` is the bytes on the wire so far."""

    path: Path
    gap: Timeout  # until missing chunks are asked for
    size: int = 0

    def _write(self, index: int, size: int, body: bytes) -> None:
        with self.path.open("r+b" if self._received else "wb") as file:
            file.seek(index * size)
            file.write(body)

    def _read(self) -> bytes:
        return self.path.read_bytes()


_Blob = tuple[int, bytes, int, int]  # round, SHA-256, number and size of chunks


@dataclass(frozen=True)
class Gap:
    """Chunks of an update that do not arrive."""

    device: str
    round: int
    missing: tuple[int, ...]


class Uploads:
    """Keeps at most PARTIALS unfinished blobs of each device. A further one replaces the least recently used one."""

    def __init__(self, folder: Path, cap_bytes: int, gap: Backoff = GAP) -> None:
        """Empties `folder`, which must hold nothing else. Refuses blobs of more than `cap_bytes`."""
        self._gap = gap
        self._folder = folder
        self._cap_bytes = cap_bytes
        self._numbers = count()
        self._syncs = ThreadPoolExecutor(SYNCS)
        self._partials: dict[str, dict[_Blob, _InFile]] = {}  # by device, the least recently used one first
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()

    def add(self, device: str, round_: int, payload: bytes) -> Upload | None:
        """The complete blob after its last chunk, else None. Chunks may come in any order and repeatedly. The caller
        must `store` or `discard` the result.

        Raises MessageError if the payload is no valid chunk or the blob does not have its announced SHA-256, OSError
        if it cannot be written. Both delete the partial blob, which frees space on a full disk. It can be sent again.
        """
        chunk = Chunk.read(payload, self._cap_bytes)
        blob = (round_, *chunk.blob)
        partial = self._remove(device, blob)
        partial.size += len(payload)
        partial.gap.restart()
        try:
            whole = partial.add(chunk)
        except (OSError, MessageError):
            partial.path.unlink(missing_ok=True)
            raise
        if whole is None:
            self._insert(device, blob, partial)
            return None
        return Upload(partial.path, whole, chunk.digest.hex(), partial.size)

    @property
    def incomplete(self) -> int:
        """Devices of whose updates some chunks are missing."""
        return len(self._partials)

    def gaps(self) -> list[Gap]:
        """The unfinished updates of which no chunk has arrived for a while, again in growing intervals: their device
        may be gone."""
        return [
            Gap(device, round_, tuple(partial.missing(chunks)[:GAP_CHUNKS]))
            for device, partials in self._partials.items()
            for (round_, _, chunks, _), partial in partials.items()
            if partial.gap.expired()
        ]

    def store(self, files: Mapping[Path, Path]) -> None:
        """Moves files of complete blobs to their targets on the same disk. They survive a power cut after this call.

        Files are synced together, because this takes hardly longer than the sync of one file. Raises OSError.
        """
        list(self._syncs.map(sync, files))
        for path, target in files.items():
            path.replace(target)
        for folder in {target.parent for target in files.values()}:
            sync(folder)

    @staticmethod
    def discard(upload: Upload) -> None:
        upload.path.unlink(missing_ok=True)

    def _remove(self, device: str, blob: _Blob) -> _InFile:
        """Removes and returns the partial blob, or a new one."""
        partials = self._partials.get(device, {})
        partial = partials.pop(blob, None)
        if not partials:
            self._partials.pop(device, None)
        return partial or _InFile(self._folder / str(next(self._numbers)), Timeout(self._gap, device))

    def _insert(self, device: str, blob: _Blob, partial: _InFile) -> None:
        """Inserts it as the most recently used one."""
        partials = self._partials.setdefault(device, {})
        partials[blob] = partial
        if len(partials) > PARTIALS:
            partials.pop(next(iter(partials))).path.unlink()
