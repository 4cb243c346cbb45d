"""Which bundle this device has verified. Its files are read again only if one of them may have changed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pydantic import BaseModel, ValidationError

from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.bundle import Bundle


class _Verified(BaseModel):
    """In STATE/verified.json: the bundle and, for each of its files, inode, size, and when its content and its inode
    last changed. Every write changes the latter, and no program can set it."""

    bundle: str
    files: dict[str, tuple[int, int, int, int]]


def verify_if_changed(bundle: Bundle, path: Path) -> None:
    """Raises BundleError as `Bundle.verify` does. `path`: the record of the last bundle that was verified."""
    present = None
    with contextlib.suppress(OSError, ValidationError):  # OSError: a file or the record is missing
        present = _present(bundle)
        if _Verified.model_validate_json(path.read_bytes()) == present:
            return
    bundle.verify()
    if present is not None:  # as before the files were read: a write meanwhile changes them again
        with contextlib.suppress(OSError):  # the disk is full
            write_atomically(path, present.model_dump_json().encode())


def _present(bundle: Bundle) -> _Verified:
    """Raises OSError if a file is missing."""
    files = {name: _version(bundle.path(name).stat()) for name in bundle.manifest.files}
    return _Verified(bundle=bundle.sha256, files=files)


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
