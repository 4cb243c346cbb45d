"""One process at a time uses a state directory."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedfmsl.errors import ConfigError


@contextmanager
def locked(state: Path, remedy: str) -> Iterator[None]:
    """Holds STATE/lock until the end of the block or of the process. Child processes do not inherit it.

    Raises ConfigError if another process holds it; `remedy` completes the message.
    """
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--state {state} is in use by another process; {remedy}") from error
        yield


def is_locked(state: Path) -> bool | None:
    """Whether a process uses the state directory now. None if there is no lock, or if this user may not read it."""
    try:
        with (state / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
