"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT}  # what an OSError says when there is no room


def write_atomically(path: Path, data: bytes | Iterable[bytes], durable: bool = False) -> None:
    """Writes `path` so that a reader, or a later start, sees the old bytes or all of the new (which may come in parts).
    With `durable` they also survive a power cut right after the call: their bytes, and their name in the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
        if durable:
            sync(path.parent)
    except OSError:  # a full disk, most likely, which the rest of the file makes no emptier
        scratch.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """A file's bytes, or what was renamed into a folder, survive a power cut from now on. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
