"""Files: how their names are shown, and how they are written atomically and durably."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from unicodedata import category

FULL = {errno.ENOSPC, errno.EDQUOT}  # error numbers of a full disk


def shown(path: os.PathLike[str] | str) -> str:
    """A path as text for messages, logs and predictions.

    Linux takes any bytes as a name. Bytes that are not UTF-8, which Python keeps as surrogates, and control characters
    are escaped; every other name stays as it is.
    """
    return "".join(map(_escaped, os.fspath(path)))


def write_atomically(path: Path, data: bytes | Iterable[bytes], durable: bool = False) -> None:
    """Writes `path` so that a reader sees either the old or all of the new bytes, also after a crash.

    `data`: the bytes, or their parts. With `durable` the file survives a power failure right after the call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except OSError:  # often a full disk, where the temporary file takes space
        temporary.unlink(missing_ok=True)
        raise


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode() if category(character) in ("Cc", "Cs") else character


def sync(path: Path) -> None:
    """Makes the bytes of a file, or the names in a folder, survive a power failure. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
