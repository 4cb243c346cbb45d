"""The global experts that the operator can return to.

RUN/experts/ROUND.safetensors    the global expert (P,) that a closed round has made, of the latest KEPT such rounds
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from fedfmsl.algorithms.arrays import Vector
from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.tensors import blob_hash, pack
from trainer_server.coordinator.rollback import EXPERT

KEPT = 20
SUFFIX = ".safetensors"


class _Made(BaseModel):
    """Header of a kept global expert. `round`: the closed round that has made it."""

    round: int


class KeptExperts:
    def __init__(self, folder: Path) -> None:
        """`folder`: of the run."""
        self._folder = folder / "experts"

    def rounds(self) -> list[int]:
        """The rounds whose global expert is kept, in order."""
        names = [path.stem for path in self._folder.glob(f"*{SUFFIX}")]
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def write(self, made: int, expert: Vector) -> None:
        """Keeps the global expert (P,) of a round, and removes the oldest ones. Raises OSError."""
        write_atomically(self._path(made), pack(_Made(round=made), {EXPERT: expert}), durable=True)
        for round_ in self.rounds()[:-KEPT]:
            self._path(round_).unlink(missing_ok=True)

    def copy(self, made: int, tensors: Path) -> str:
        """Copies the global expert of a round to the folder `tensors`, named by its SHA-256, which it returns; "" if it
        is not kept. Raises OSError."""
        try:
            blob = self._path(made).read_bytes()
        except FileNotFoundError:
            return ""
        sha256 = blob_hash(blob)
        write_atomically(tensors / sha256, blob, durable=True)
        return sha256

    def _path(self, made: int) -> Path:
        return self._folder / f"{made}{SUFFIX}"
