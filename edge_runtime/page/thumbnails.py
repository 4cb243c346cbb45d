"""Small pictures of files, made when a browser asks for them. The newest ones stay in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from edge_runtime.data.images import thumbnail
from edge_runtime.data.unreadable import read_file
from edge_runtime.engines.memory import release_free_memory
from fedfmsl.common.folder_walk import FileVersion

KEPT_BYTES = 2**23  # about 500 pictures
SIZES = {"small": 160, "large": 640}  # pixels of the longer side


class Thumbnails:
    """Decodes one file at a time, in any thread, so that the memory for decoding is bounded."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[tuple[Path, FileVersion, int], bytes] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def get(self, path: Path, version: FileVersion, size: int) -> bytes:
        """A JPEG. Raises UnreadableError."""
        key = path, version, size
        with self._lock:
            made = self._kept.pop(key, None)
            if made is None:
                made = thumbnail(read_file(path), size)
                release_free_memory()
                self._used += len(made)
            self._kept[key] = made
            while self._used > self._kept_bytes:
                self._used -= len(self._kept.popitem(last=False)[1])
        return made
