"""What a session that goes on from an earlier run or session stores of it, so that it needs nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel

from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.protocol.tensors import blob_hash, pack
from trainer_server.coordinator.warm_start import WarmStart


class StartOrigin(BaseModel):
    """Where a session starts from.

    `source`: the folder, of a run or of an adapter; "" for the session before of the same run. `run`, `session` and
    `round`: of an earlier run or session, up to its last closed round. `level`: SAL's. `added` and `removed`: names of
    classes. `mu_squared`: by observer, the sums of μ² of all earlier runs, but not of the earlier sessions of this run,
    whose rounds the run counts; None if updates without noise are in the start, or if it is unknown. `sha256`: of the
    tensors.
    """

    source: str
    run: str = ""
    session: str = ""
    round: int = 0
    level: int
    kept: tuple[bool, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    mu_squared: dict[str, float] | None = None
    sha256: str

    @property
    def text(self) -> str:
        """One line for the operator."""
        whole = f"run {self.run!r} after round {self.round}" if self.run else "an adapter"
        where = f"{self.source}, {whole}" if self.source else f"its session before, after round {self.round}"
        changes = {"new": self.added, "removed": self.removed}
        classes = "".join(f"; {what}: {', '.join(names)}" for what, names in changes.items() if names)
        return f"{where}, at level {self.level}{classes}"


class _Header(BaseModel):
    """Header of the start's tensors."""


@dataclass(frozen=True)
class Start:
    """A start, and its tensors as a blob."""

    origin: StartOrigin
    blob: bytes

    @classmethod
    def of(cls, warm: WarmStart, **facts: object) -> Start:
        """`facts`: fields of `StartOrigin` that do not follow from `warm`."""
        blob = pack(_Header(), {"expert": warm.expert, "gate": warm.gate})
        kept = tuple(map(bool, warm.kept))
        fields = {"level": warm.level, "kept": kept, "sha256": blob_hash(blob), **facts}
        return cls(StartOrigin.model_validate(fields), blob)


def warm_start_of(origin: StartOrigin, tensors: Tensors) -> WarmStart:
    """The inverse of `Start.of`."""
    expert, gate = (np.asarray(tensors[name], np.float32) for name in ("expert", "gate"))
    return WarmStart(expert, gate, origin.level, np.array(origin.kept, np.bool_))
