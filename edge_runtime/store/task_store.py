"""The tasks of a device: the one that it last started with, and that of its personalized model."""

from __future__ import annotations

import contextlib
from pathlib import Path

from edge_runtime.store.global_store import GlobalStore
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import MessageError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.task import TASK, Task
from fedfmsl.protocol.task_bundle import TaskBundle


class TaskStore(GlobalStore):
    """STATE/tasks/SHA256, and in STATE/task the SHA-256 of the present one."""

    def __init__(self, state: Path) -> None:
        super().__init__(state / "tasks")
        self.path = state / "task"

    def task(self, sha256: str) -> Task | None:
        """None if it is missing or damaged."""
        blob = self.read(sha256)
        with contextlib.suppress(MessageError):
            return Task.unpack(blob) if blob is not None else None
        return None

    def present(self) -> Task | None:
        """The task that the device last started with. None if it has not started yet."""
        try:
            return self.task(self.path.read_text("ascii", errors="replace").strip())
        except OSError:
            return None

    def known_for(self, bundle: Bundle) -> Task | None:
        """What a device takes for the run's task until it hears the server: the task that it last started with, or the
        one beside the bundle's files. Raises BundleError if the latter is not valid."""
        present = self.present()
        if present is not None and present.bundle == bundle.sha256:
            return present
        path = bundle.root / TASK
        return TaskBundle(bundle, Task.read(path), f"task {path}").task if path.is_file() else None

    def keep(self, present: Task, *of_models: str) -> None:
        """Removes all tasks but the `present` one and those of the personalized models, whose SHA-256 are given. Does
        nothing on a disk that cannot be written."""
        with contextlib.suppress(OSError):
            if self.read(present.sha256) is None:
                self.write(present.blob)
            write_atomically(self.path, present.sha256.encode())
            self.keep_only({present.sha256, *of_models})
