"""A lock file, which at most one process holds at a time. It names that process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[None]:
    """Holds the lock until the end of the block or of the process. Child processes do not inherit it.

    If another process or thread holds it: with `wait` waits for it, otherwise raises BlockingIOError. Raises OSError if
    the file cannot be opened.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        with contextlib.suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        yield


def is_held(path: Path) -> bool | None:
    """Whether a process holds the lock now. None if there is no lock, or if this user may not read it."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def process_of(path: Path) -> int | None:
    """The id of the process that holds the lock, or held it last. None if it is unknown."""
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None
