"""The files that this process opens to read, as an audit hook sees them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Hook = Callable[[Path], None]

_hooks: list[Hook] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _hooks and isinstance(arguments[0], (str, bytes)) and "w" not in str(arguments[1]):
        path = Path(os.fsdecode(arguments[0]))
        for hook in tuple(_hooks):
            hook(path)


sys.addaudithook(_audit)  # cannot be removed


@contextmanager
def on_open(hook: Hook) -> Iterator[None]:
    """Calls `hook` before a file is opened to read. An exception that it raises is that of the opening."""
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


@contextmanager
def opened_below(folder: Path) -> Iterator[list[str]]:
    """The names of the files below `folder`, once for each time that one is opened."""
    names: list[str] = []

    def record(path: Path) -> None:
        if path.is_relative_to(folder):
            names.append(path.name)

    with on_open(record):
        yield names
