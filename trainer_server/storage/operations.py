"""What the operator asks of a run, from the console's process to the server.

RUN/operations/TIME.json     one action each, removed after it is in the run's log

Every action can be carried out twice without harm, because the server may crash in between.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from fedfmsl.common.files import write_atomically
from fedfmsl.errors import MessageError
from fedfmsl.protocol.messages import encode, parse
from trainer_server.coordinator.operator import Operation

FOLDER = "operations"
MOST = 100  # that wait for the server


class Operations:
    def __init__(self, folder: Path) -> None:
        """`folder`: of the run."""
        self._folder = folder / FOLDER

    def add(self, operation: Operation) -> bool:
        """False if too many wait already. Raises OSError."""
        if len(self._paths()) >= MOST:
            return False
        write_atomically(self._folder / f"{time.time_ns():020d}.json", encode(operation), durable=True)
        return True

    def waiting(self) -> list[tuple[Path, Operation | None]]:
        """In the order in which they were added; None for a file that holds no action. A file that cannot be opened
        now, for example without a free descriptor, is left for later."""
        found: list[tuple[Path, Operation | None]] = []
        for path in self._paths():
            with contextlib.suppress(OSError):
                found.append((path, _read(path)))
        return found

    def _paths(self) -> list[Path]:
        try:
            return sorted(path for path in self._folder.iterdir() if path.suffix == ".json")
        except OSError:  # there is no such folder yet, or no free descriptor
            return []


def _read(path: Path) -> Operation | None:
    with path.open("rb") as file:
        body = file.read(Operation.max_bytes + 1)
    try:
        return parse(Operation, body)
    except MessageError:
        return None
