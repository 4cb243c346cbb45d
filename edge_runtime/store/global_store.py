"""Blobs that a device has received, named by their SHA-256: STATE/globals/SHA256, STATE/tasks/SHA256."""

from __future__ import annotations

from pathlib import Path

from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.tensors import blob_hash


class GlobalStore:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, sha256: str) -> bytes | None:
        """The blob, or None if it is missing or damaged."""
        path = self._folder / sha256
        if not path.is_file():
            return None
        blob = path.read_bytes()
        return blob if blob_hash(blob) == sha256 else None

    def write(self, blob: bytes) -> None:
        """Not durable: a lost blob is received again."""
        write_atomically(self._folder / blob_hash(blob), blob)

    def keep_only(self, sha256s: set[str]) -> None:
        """Removes all other blobs."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name not in sha256s:
                    path.unlink(missing_ok=True)
