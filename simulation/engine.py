"""`ResidentEngine`: the engine that all virtual devices of a process share."""

from __future__ import annotations

from edge_runtime.engines.sessions import InferenceSession
from edge_runtime.engines.step_graph import StepGraphEngine
from fedfmsl.protocol.task_bundle import TaskBundle


class ResidentEngine(StepGraphEngine):
    """A `StepGraphEngine` that keeps the sessions of all levels. Virtual devices alternate between levels, and to open
    a session takes longer than a local epoch. A real device has no memory for that."""

    def __init__(self, bundle: TaskBundle, threads: int = 0) -> None:
        """`threads` = 0 uses all cores."""
        super().__init__(bundle, threads)
        self._resident: dict[int, dict[str, InferenceSession]] = {}

    def load(self, level: int) -> None:
        if level != self._level:
            self._resident[self._level] = self._sessions
            self._sessions = {}  # so that none is closed
        super().load(level)
        self._sessions = self._resident.setdefault(level, self._sessions)
