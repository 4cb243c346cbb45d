"""One process at a time works on a device's state folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedfmsl.errors import ConfigError


@contextmanager
def locked(state: Path, instead: str) -> Iterator[None]:
    """STATE/lock is held until the end of the block, or of the process, by whatever way it ends; children do not
    inherit it.

    Raises ConfigError if another process holds it; `instead` says what to do then.
    """
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--state {state} is in use by another process; {instead}") from error
        yield


def is_locked(state: Path) -> bool:
    """Whether a process works on the folder just now, as far as this user can see."""
    try:
        with (state / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody ever has, or it is not ours to look
        pass
    return False
