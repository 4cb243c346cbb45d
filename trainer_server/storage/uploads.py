"""Collects the chunks of updates in files, so that unfinished updates need no memory.

UPLOADS/N                a blob, with each received chunk at its offset; an update of one chunk needs no file

A file is used again for a later blob: to make and to delete one takes longer than to write it. The folder is emptied at
every start, because devices retransmit unfinished updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedfmsl.common.backoff import GAP, Backoff, Timeout
from fedfmsl.errors import MessageError
from fedfmsl.protocol.chunks import Chunk, PartialBlob, checked

PARTIALS = 2  # of one device: a late update and one of the next round
GAP_CHUNKS = 16  # asked for at once; a broker that has dropped chunks may drop more of a burst


@dataclass(frozen=True)
class Upload:
    """A complete blob. `size` is its bytes on the wire, including repeated chunks."""

    blob: bytes
    sha256: str
    size: int


@dataclass(slots=True)
class _InFile(PartialBlob):
    """`size` is the bytes on the wire so far, `end` the position behind the last byte of the blob so far."""

    path: Path
    gap: Timeout  # until missing chunks are asked for
    size: int = 0
    end: int = 0

    def _write(self, index: int, size: int, body: bytes) -> None:
        with self.path.open("r+b") as file:  # it may have the bytes of an earlier blob, perhaps a longer one
            file.seek(index * size)
            file.write(body)
        self.end = max(self.end, index * size + len(body))

    def _read(self) -> bytes:
        with self.path.open("rb") as file:
            return file.read(self.end)


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
        self._files = 0
        self._free: list[Path] = []  # files that are not in use
        self._partials: dict[str, dict[_Blob, _InFile]] = {}  # by device, the least recently used one first
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()

    def add(self, device: str, round_: int, payload: bytes) -> Upload | None:
        """The complete blob after its last chunk, else None. Chunks may come in any order and repeatedly.

        Raises MessageError if the payload is no valid chunk or the blob does not have its announced SHA-256, OSError
        if it cannot be written. Both give up the partial blob; after an OSError, files that are not in use are deleted,
        which frees space on a full disk. The blob can be sent again.
        """
        chunk = Chunk.read(payload, self._cap_bytes)
        if chunk.count == 1:
            return Upload(checked(chunk.body, chunk.digest), chunk.digest.hex(), len(payload))
        blob = (round_, *chunk.blob)
        partial = self._remove(device, blob)
        partial.size += len(payload)
        partial.gap.restart()
        try:
            whole = partial.add(chunk)
        except OSError:
            for path in (partial.path, *self._free):
                path.unlink(missing_ok=True)
            self._free.clear()
            raise
        except MessageError:
            self._free.append(partial.path)
            raise
        if whole is None:
            self._insert(device, blob, partial)
            return None
        self._free.append(partial.path)
        return Upload(whole, chunk.digest.hex(), partial.size)

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

    def _remove(self, device: str, blob: _Blob) -> _InFile:
        """Removes and returns the partial blob, or a new one."""
        partials = self._partials.get(device, {})
        partial = partials.pop(blob, None)
        if not partials:
            self._partials.pop(device, None)
        return partial or _InFile(self._file(), Timeout(self._gap, device))

    def _file(self) -> Path:
        """A file that is not in use. Raises OSError if it cannot be made."""
        if not self._free:
            path = self._folder / str(self._files)
            path.touch()
            self._files += 1
            return path
        return self._free.pop()

    def _insert(self, device: str, blob: _Blob, partial: _InFile) -> None:
        """Inserts it as the most recently used one."""
        partials = self._partials.setdefault(device, {})
        partials[blob] = partial
        if len(partials) > PARTIALS:
            self._free.append(partials.pop(next(iter(partials))).path)
