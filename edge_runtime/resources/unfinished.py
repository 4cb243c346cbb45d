"""How often in a row an execution provider's work had no end (ours).

A driver that crashes ends the process without an error, and one that takes the machine down looks like a power cut. So
a provider is counted while it works, and forgotten when that work ends, with or without an error. What is left at the
start is of work that a crash, a kill or a power cut ended. One of them is no proof, so LIMIT in a row are needed. A
device that waits for a round does not work, and is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError

from edge_runtime.engines.sessions import CPU
from fedfmsl.common.files import write_atomically

LIMIT = 3


class _Counts(BaseModel):
    """In STATE/unfinished.json: times in a row, by provider."""

    times: dict[str, int] = {}


class UnfinishedWork:
    """The counts in the state directory `root`. The CPU is not counted. A full disk is no error: nothing is counted."""

    def __init__(self, root: Path) -> None:
        self._path = root / "unfinished.json"

    def refusal(self, provider: str) -> str:
        """Why the provider is not used, or ""."""
        times = self._read().get(provider, 0)
        return f"the device ended {times} times in a row while it computed" if times >= LIMIT else ""

    @contextlib.contextmanager
    def counted(self, provider: str) -> Iterator[None]:
        """The time in which the provider works."""
        if provider == CPU:
            yield
            return
        before = self._read()
        self._write({**before, provider: before.get(provider, 0) + 1})
        try:
            yield
        finally:
            self._write({name: times for name, times in before.items() if name != provider})

    def forget(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, int]:
        try:
            return _Counts.model_validate_json(self._path.read_bytes()).times
        except (OSError, ValidationError):
            return {}

    def _write(self, times: dict[str, int]) -> None:
        with contextlib.suppress(OSError):
            if times:
                write_atomically(self._path, _Counts(times=times).model_dump_json().encode(), durable=True)
            else:
                self._path.unlink(missing_ok=True)
