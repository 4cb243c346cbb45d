"""What status and console read of a run besides its records: what has changed since the last checkpoint, and sizes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from trainer_server.coordinator.events import LimitsChanged, OperatorActed
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.operator import after_operation, after_operations
from trainer_server.storage.run_store import DATABASE, RunStore


@dataclass(frozen=True)
class ServerProcess:
    """`runs`: None if this user may not know. `pid`: None if unknown. `last_event`: unix seconds; 0: none."""

    runs: bool | None
    pid: int | None
    last_event: float


def server_process(store: RunStore) -> ServerProcess:
    """The process that coordinates this run, or did so last."""
    at = 0.0 if store.is_unstarted() else store.files.touched()
    return ServerProcess(store.files.is_locked(), store.files.process(), at)


def paused_and_excluded(store: RunStore) -> tuple[bool, frozenset[str]]:
    """Whether the operator has paused the run, and the devices that the operator has excluded."""
    operations = [one.event.operation for one in store.events("operator") if isinstance(one.event, OperatorActed)]
    checkpoint = store.checkpoint()
    if checkpoint is None:
        return after_operations(False, (), operations)
    return after_operations(checkpoint[0].paused_at is not None, checkpoint[0].excluded, operations)


def limits_in_force(store: RunStore) -> Limits:
    """The limits of the checkpoint, and what has changed after it."""
    checkpoint = store.checkpoint()
    limits = checkpoint[0].limits if checkpoint else Limits.of(store.origin.config)
    for logged in store.events("limits", "operator"):
        if isinstance(logged.event, LimitsChanged):
            limits = logged.event.limits
        elif isinstance(logged.event, OperatorActed):
            limits = after_operation(limits, logged.event.operation)
    return limits


def sizes_of(store: RunStore) -> dict[str, int]:
    """Bytes on the disk: of the database, the tensors and all other files."""
    found = {"database": 0, "tensors": 0, "other": 0}
    for path in store.folder.rglob("*"):
        with contextlib.suppress(OSError):  # it was just removed
            kind = "tensors" if path.parent == store.blobs.folder else "database" if DATABASE in path.name else "other"
            found[kind] += path.stat().st_size if path.is_file() else 0
    return found
