"""The small files of a run's folder, beside the database and the tensors.

RUN/lock             held by the server of the run; names its process, and was changed at its last event
RUN/joined.json      before the first round: the devices that are online
RUN/certificates.json  when the certificates of server and broker expire
RUN/outage.json      since when and why there is no connection to the broker
RUN/tasks/SHA256     the tasks of the run's first and present session
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedfmsl.common.files import write_atomically
from fedfmsl.common.lock_file import held, is_held, process_of
from fedfmsl.errors import BundleError, RunError
from fedfmsl.protocol.task import Task

TASKS = "tasks"
JOINED = "joined.json"
OUTAGE = "outage.json"
CERTIFICATES = "certificates.json"


class RunFiles:
    """Methods that write raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    # lock

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Excludes other servers within this context. Raises RunError if another server has the lock."""
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self._lock))
            except BlockingIOError as error:
                raise RunError(f"another server runs in {self._folder}; stop it first") from error
            yield

    @property
    def _lock(self) -> Path:
        return self._folder / "lock"

    def is_locked(self) -> bool | None:
        """Whether a server has the lock; None if this user may not know."""
        return is_held(self._lock)

    def process(self) -> int | None:
        """The process that has the lock or had it last; None if it is unknown."""
        return process_of(self._lock)

    def touch(self) -> None:
        """An event was stored now."""
        with contextlib.suppress(OSError):
            os.utime(self._lock)

    def touched(self) -> float:
        """When an event was stored last, in unix seconds; 0 if the run never had a server."""
        try:
            return self._lock.stat().st_mtime
        except OSError:
            return 0.0

    # tasks

    def task(self, sha256: str) -> Task:
        """Raises RunError if its file is missing or altered."""
        path = self._folder / TASKS / sha256
        try:
            task = Task.read(path)
        except BundleError as error:
            raise RunError(f"{error}; or restore the file from a backup") from error
        if task.sha256 != sha256:
            raise RunError(f"{path} was altered (wrong SHA-256); restore it from a backup")
        return task

    def write_task(self, task: Task) -> None:
        (self._folder / TASKS).mkdir(exist_ok=True)
        write_atomically(self._folder / TASKS / task.sha256, task.blob, durable=True)

    def keep_tasks(self, kept: Collection[str]) -> None:
        """Deletes all others. `kept`: SHA-256 of tasks."""
        for path in (self._folder / TASKS).iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)

    # for status and console

    def save_joined(self, devices: Iterable[str]) -> None:
        """Stores which devices are online before the first round."""
        write_atomically(self._folder / JOINED, json.dumps(sorted(devices)).encode())

    def joined(self) -> list[str]:
        """The devices that were online at the last `save_joined`."""
        try:
            return list(json.loads((self._folder / JOINED).read_bytes()))
        except FileNotFoundError:
            return []

    def save_outage(self, since: float, reason: str) -> None:
        """Stores why the server has no connection to the broker."""
        write_atomically(self._folder / OUTAGE, json.dumps([since, reason]).encode())

    def outage(self) -> tuple[float, str]:
        """Since when (unix seconds) and why the server had no connection at the last `save_outage`; 0 and "" if it had
        one."""
        try:
            since, reason = json.loads((self._folder / OUTAGE).read_bytes())
        except FileNotFoundError:
            return 0.0, ""
        return float(since), str(reason)

    def save_certificates(self, until: Mapping[str, float]) -> None:
        """Stores when certificates expire (unix seconds), by the name of their owner."""
        write_atomically(self._folder / CERTIFICATES, json.dumps(dict(until)).encode())

    def certificates(self) -> dict[str, float]:
        """What the last `save_certificates` stored."""
        try:
            return dict(json.loads((self._folder / CERTIFICATES).read_bytes()))
        except FileNotFoundError:
            return {}
