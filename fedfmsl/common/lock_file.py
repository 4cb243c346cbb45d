"""A lock file, which at most one process holds at a time. It names that process.

The lock belongs to the open file (`F_OFD_SETLK` of Linux), so it ends with the process, and can be looked at without
taking it: a look never makes a process that starts fail.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")  # of 64-bit Linux: type, whence, start, length, process
_WHOLE_FILE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds the lock until the end of the block or of the process. Child processes do not inherit it.

    If another process or thread holds it: with `wait` waits for it, otherwise raises BlockingIOError. Raises OSError if
    the file cannot be opened.
    """
    with path.open("a") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, _WHOLE_FILE)
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def is_held(path: Path) -> bool | None:
    """Whether a process holds the lock now. None if there is no lock, or if this user may not read it."""
    try:
        with path.open() as file:
            found = fcntl.fcntl(file, fcntl.F_OFD_GETLK, _WHOLE_FILE)
    except OSError:
        return None
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def process_of(path: Path) -> int | None:
    """The id of the process that holds the lock, or held it last. None if it is unknown."""
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None
