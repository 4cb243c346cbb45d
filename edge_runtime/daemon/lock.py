"""One process at a time uses a state directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedfmsl.common.lock_file import held, is_held
from fedfmsl.errors import ConfigError


@contextmanager
def locked(state: Path, remedy: str) -> Iterator[None]:
    """Holds STATE/lock until the end of the block or of the process.

    Raises ConfigError if another process holds it; `remedy` completes the message.
    """
    state.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(_path(state)))
        except BlockingIOError as error:
            raise ConfigError(f"--state {state} is in use by another process; {remedy}") from error
        yield


def is_locked(state: Path) -> bool | None:
    """Whether a process uses the state directory now. None if there is no lock, or if this user may not read it."""
    return is_held(_path(state))


def _path(state: Path) -> Path:
    return state / "lock"
