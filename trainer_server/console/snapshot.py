"""What the console shows of a run, read from its folder. Only what has changed since the last look is read again."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from fedfmsl.errors import RunError
from fedfmsl.protocol.messages import Round, Stage
from trainer_server.coordinator.limits import Limits
from trainer_server.coordinator.operator import Operation
from trainer_server.coordinator.records import ClosedRound, RoundSummary
from trainer_server.coordinator.refusals import is_left_out, left_out_of_sums
from trainer_server.storage import observations
from trainer_server.storage.checkpoint import Checkpoint
from trainer_server.storage.observations import DeviceView, ServerView, read_observations
from trainer_server.storage.operations import Operations
from trainer_server.storage.origin import Origin
from trainer_server.storage.refusal_counts import RefusalCount
from trainer_server.storage.run_store import DATABASE, RunStore

BUSY_SECONDS = 2.0
FRESH_SECONDS = 0.2  # between two looks at a folder
DEPTH = 3  # of a run below the folder of several runs
SILENT_SECONDS = 15.0  # after which a server has stopped, or is busy


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. `left_out`, `silent`: by device, until which round; the latter of secure sums only.
    `took_part`: by device, in how many of the `trained` training rounds. `counts`: see `RoundRecords.counts`.
    `waiting`: actions that the server has not carried out. `outage`: since when and why the server has no connection
    to the broker. `classes`: of the present session; none if they cannot be read."""

    key: str
    folder: Path
    origin: Origin
    ended: str | None = None
    server: ServerView | None = None
    announced: Round | None = None
    expected: frozenset[str] = frozenset()
    answered: frozenset[str] = frozenset()
    limits: Limits | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    silent: Mapping[str, int] = field(default_factory=dict)
    devices: Mapping[str, DeviceView] = field(default_factory=dict)
    closed: Sequence[tuple[RoundSummary, float]] = ()
    counts: Mapping[tuple[Stage, bool], int] = field(default_factory=dict)
    took_part: Mapping[str, int] = field(default_factory=dict)
    trained: int = 0
    refusals: Mapping[str, Sequence[RefusalCount]] = field(default_factory=dict)
    waiting: Sequence[Operation] = ()
    outage: tuple[float, str] = (0.0, "")
    classes: tuple[str, ...] = ()

    @property
    def is_running(self) -> bool:
        """Whether a server works on it, as far as the folder shows."""
        return self.ended is None and self.server is not None and time.time() - self.server.seen < SILENT_SECONDS

    @property
    def missing(self) -> list[str]:
        """The selected devices of the present round that have not answered."""
        return sorted(self.expected - self.answered - self.excluded) if self.ended is None else []

    @property
    def excluded(self) -> frozenset[str]:
        return frozenset(self.server.excluded if self.server else ())


class RunReader:
    """Reads one run. Used by several threads."""

    def __init__(self, key: str, folder: Path) -> None:
        """Raises RunError if it is no run, or of another version."""
        self.key, self.folder = key, folder
        self._lock = threading.Lock()
        self._stamps: Sequence[tuple[int, int]] = ()
        self._looked = 0.0
        self._number = -1  # of the checkpoint
        self._checkpoint: Checkpoint | None = None
        self._since = 0.0  # devices that have changed then were read
        with closing(self._store()) as store:
            self._snapshot = Snapshot(key, folder, store.origin)

    def snapshot(self) -> Snapshot:
        """The run as it is now. If it cannot be read, as it was at the last look."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= FRESH_SECONDS:
                self._looked = now
                stamps = self._stamps_now()
                if stamps != self._stamps:
                    try:
                        self._snapshot = self._read()
                        self._stamps = stamps
                    except (RunError, sqlite3.Error, OSError, ValueError):
                        pass
            return self._snapshot

    def record(self, number: int) -> ClosedRound | None:
        """None if the round is not closed. Raises RunError if the run cannot be read now."""
        with closing(self._store()) as store:
            return store.rounds.one(number)

    def _store(self) -> RunStore:
        return RunStore(self.folder, BUSY_SECONDS)

    def _stamps_now(self) -> list[tuple[int, int]]:
        names = [f"{name}{end}" for name in (DATABASE, observations.DATABASE) for end in ("", "-wal")]
        found = []
        for name in [*names, "operations", "outage.json"]:
            try:
                stat = (self.folder / name).stat()
                found.append((stat.st_mtime_ns, stat.st_size))
            except OSError:
                found.append((0, 0))
        return found

    def _read(self) -> Snapshot:
        with closing(self._store()) as store:
            if store.origin.session != self._snapshot.origin.session:  # another run is in the folder now
                self._snapshot = Snapshot(self.key, self.folder, store.origin)
                self._number, self._since = -1, 0.0
            last = self._snapshot
            server, changed = read_observations(self.folder, self._since)
            if server is not None and server.seen < self._since:  # the clock was set back
                server, changed = read_observations(self.folder)
            number = store.checkpoint_number()
            if number != self._number:
                checkpoint = store.checkpoint()
                self._checkpoint, self._number = (checkpoint[0] if checkpoint else None), number
            point = self._checkpoint
            announced = point.announced if point else None
            refusals: dict[str, list[RefusalCount]] = {}
            for count in store.refusals.all():
                refusals.setdefault(count.device, []).append(count)
            newest = last.closed[-1][0].round if last.closed else 0
            closed = store.rounds.summaries(after=newest)
            took_part, trained = store.rounds.participation(newest, closed[-1][0].round) if closed else ({}, 0)
            devices = {status.device: DeviceView(status=status) for status in point.devices} if point else {}
            snapshot = Snapshot(
                key=self.key,
                folder=self.folder,
                origin=store.origin,
                ended=store.ended,
                server=server,
                announced=announced,
                expected=frozenset(point.expected if point else ()),
                answered=frozenset(store.pending_updates()),
                silent=left_out_of_sums(point.silent, announced.round) if point and announced else {},
                limits=point.limits if point else None,
                left_out={
                    name: refused.until
                    for name, refused in (point.refused.items() if point else ())
                    if announced and is_left_out(refused, announced.round)
                },
                devices=devices | dict(last.devices) | changed,
                closed=[*last.closed, *closed][-store.origin.config.keep_rounds :],
                counts=store.rounds.counts() if store.origin.config.privacy else {},
                took_part=Counter(last.took_part) + Counter(took_part),
                trained=last.trained + trained,
                refusals=refusals,
                waiting=[operation for _, operation in Operations(self.folder).waiting() if operation],
                outage=store.files.outage(),
                classes=last.classes or _classes(store),
            )
        if server is not None:
            self._since = server.seen
        return snapshot


def _classes(store: RunStore) -> tuple[str, ...]:
    try:
        return store.task().classes
    except RunError:
        return ()


class Runs:
    """The runs in a folder: its own, or those of the folders below it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._readers: dict[str, RunReader] = {}
        self._lock = threading.Lock()

    def readers(self) -> list[RunReader]:
        """Finds new runs as well. Folders that hold no readable run are left out."""
        with self._lock:
            for folder in self._folders():
                key = sha256(str(folder.absolute()).encode()).hexdigest()[:10]
                if key not in self._readers:
                    try:
                        self._readers[key] = RunReader(key, folder)
                    except RunError:
                        continue
            return [self._readers[key] for key in self._readers]

    def reader(self, key: str) -> RunReader | None:
        return next((reader for reader in self.readers() if reader.key == key), None)

    def _folders(self) -> list[Path]:
        if (self._folder / DATABASE).is_file():
            return [self._folder]
        patterns = ["/".join([*"*" * depth, DATABASE]) for depth in range(1, DEPTH + 1)]
        return sorted(path.parent for pattern in patterns for path in self._folder.glob(pattern))
