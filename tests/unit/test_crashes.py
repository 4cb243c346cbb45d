"""A device that is killed between any two of its writes and restarted with the files that it left."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from support.bundles import Built, random_theta
from support.in_process_daemon import RUN, make_daemon

from edge_runtime.daemon.disk_retry import DiskRetry
from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.stored_model import read_personal_model
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.common.backoff import Backoff
from fedfmsl.protocol.messages import Globals, Round, Stage, Training, Update
from fedfmsl.protocol.tensors import blob_hash, pack, unpack

SESSION = "s"
SAL = Sal(CapabilityQueue(2, 1.0), max_level=2)  # it activates more blocks as soon as it can
EXPERTS = ("personal", "baseline", "mixture")
FOR_PEOPLE = ("health.json", "skipped.txt")  # that they cannot be written stops nothing
VOLATILE = {"seconds", "peak_rss_mb", "bytes_down"}


class Killed(BaseException):
    """Like SIGKILL: nothing in the daemon catches it."""


class Writes:
    """Counts what takes its place on the disk. Makes one of the writes fail, right before or right after it, or copies
    a folder then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self._fails: Callable[[int, str], bool] = lambda number, name: False
        self._error: BaseException = Killed()
        self._after = False
        self._looks: Callable[[int, str], object] = lambda number, moment: None
        replace = Path.replace

        def counted(source: Path, target: Path) -> None:
            number = len(self.names)
            fails = self._fails(number, str(target))
            self._looks(number, "before")
            self.names.append(str(target))
            if not fails or self._after:
                replace(source, target)
            if fails:
                raise self._error
            self._looks(number, "after")

        monkeypatch.setattr(Path, "replace", counted)

    def of(self, work: Callable[[], object]) -> list[str]:
        """The files that are written, in order."""
        self.names = []
        work()
        return self.names

    def left_behind(
        self, folder: Path, copies: Path, numbers: list[int], work: Callable[[], object]
    ) -> dict[str, Path]:
        """Copies of `folder` as a process leaves it that is killed before or after one of these writes. Of equal copies
        there is one."""
        found: dict[str, Path] = {}
        seen: set[bytes] = set()

        def copy(number: int, moment: str) -> None:
            if number in numbers and (content := content_of(folder)) not in seen:
                seen.add(content)
                found[f"{moment} write {number}"] = copied(folder, copies / f"{number}-{moment}")

        self._looks = copy
        self.of(work)
        self._looks = lambda number, moment: None
        return {f"{moment}, {self.names[int(moment.split()[-1])]}": path for moment, path in found.items()}

    @contextmanager
    def failing(self, fails: Callable[[int, str], bool], error: BaseException, after: bool = False) -> Iterator[None]:
        """`fails` is told a write's number and the file's name."""
        self.names, self._fails, self._error, self._after = [], fails, error, after
        yield
        self._fails = lambda number, name: False


def content_of(folder: Path) -> bytes:
    """A hash of all files and their names; of features, which never change, only of the names."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path} ".encode() + (b"" if "cache" in path.parts else path.read_bytes()))
    return digest.digest()


def copied(folder: Path, to: Path) -> Path:
    """A copy. Features are links: there are hundreds."""

    def copy(source: str, target: str) -> None:
        (os.link if "cache" in Path(source).parts else shutil.copy2)(source, target)

    return Path(shutil.copytree(folder, to, copy_function=copy))


class Runner(RoundRunner):
    """Does not write the personalized model: another process does it, out of files that are compared here."""

    def write_personalized(self) -> None: ...


def start(vit: Built, photos: Path, folder: Path, name: str = "d") -> RoundRunner:
    return make_daemon(vit, photos, folder, name, runner_type=Runner).runner


def perform(runner: RoundRunner, task: Round) -> None:
    """As the worker thread does for a round."""
    runner.scan()
    runner.run(task, bytes_down=0)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # power failures are not tested here
    return Writes(monkeypatch)


def rounds(vit: Built) -> tuple[list[Round], list[bytes]]:
    """Every stage in the order of a run, and the global blobs that they name."""
    bundle = vit.bundle
    expert = bundle.expert.split(random_theta(bundle, 2, seed=1))
    start = bundle.expert.split(random_theta(bundle, 1, seed=2))
    gate = bundle.gate.split(bundle.initial()[1])
    named = {"expert": expert, "start": start, "gate": gate}
    blobs = {kind: pack(Globals(run=RUN, kind=kind), tensors) for kind, tensors in named.items()}
    hashes = {kind: blob_hash(blob) for kind, blob in blobs.items()}
    steps = [(Stage.STATISTICS, 0), (Stage.GLOBAL, 0), (Stage.GLOBAL, 1)]
    steps += [(Stage.PERSONAL, index) for index in range(3)] + [(Stage.BASELINE, 0), (Stage.EVALUATE, 0)]
    announced = [
        Round(
            run=RUN,
            session=SESSION,
            round=number,
            stage=stage,
            index=index,
            of=3,
            level=2,
            training=Training(epochs=1, batch_size=8, learning_rate=0.01),
            sal=SAL,
            **({} if stage is Stage.STATISTICS else hashes),
        )
        for number, (stage, index) in enumerate(steps, start=1)
    ]
    return announced, list(blobs.values())


def kept(folder: Path, task: Round) -> dict[str, object]:
    """What the round left behind: the update that would be sent, without what time has written into its header, and
    the experts that stay."""
    update, tensors = unpack(DeviceStore(folder).outbox.read(task.round) or b"", Update)
    files = {name: (folder / name).read_bytes() for name in EXPERTS if (folder / name).is_file()}
    return {**update.model_dump(exclude=VOLATILE), **{name: tensors[name].tobytes() for name in tensors}, **files}


def selected_writes(written: list[str]) -> list[int]:
    """The numbers of all writes but those of features, of which there are hundreds; of them three."""
    features = [number for number, name in enumerate(written) if "/cache/" in name]
    others = [number for number in range(len(written)) if number not in features]
    return sorted({*others, *features[:: len(features) // 2 or 1]})


def give(device: TrainingContext, blobs: list[bytes]) -> None:
    """As if they had come over the wire."""
    for blob in blobs:
        device.store.globals.write(blob)


def test_a_round_that_was_interrupted_anywhere_gives_the_same_update_to_the_bit(
    vit: Built, photos: Path, tmp_path: Path, writes: Writes
) -> None:
    runner = start(vit, photos, tmp_path / "undisturbed")
    device = runner.device
    tasks, blobs = rounds(vit)
    for task in tasks:
        give(device, blobs)
        before = copied(device.store.root, tmp_path / "before")
        written = writes.of(partial(perform, runner, task))
        assert written[-1].endswith(f"/outbox/{task.round}")
        again, selected = start(vit, photos, before), selected_writes(written)
        left = writes.left_behind(before, tmp_path / "left", selected, partial(perform, again, task))
        assert len(left) > len(selected)  # each before its write, and the last one also after it
        for moment, folder in left.items():
            restarted = start(vit, photos, folder)
            if task.round not in restarted.device.store.outbox.unacknowledged(SESSION):  # else it is only to be sent
                perform(restarted, task)
            where = f"{task.stage.value} {task.index}, killed {moment}"
            assert kept(folder, task) == kept(device.store.root, task), where
        shutil.rmtree(before)
        shutil.rmtree(tmp_path / "left")


def test_a_round_on_a_full_disk_gives_the_same_update_to_the_bit(
    vit: Built, photos: Path, tmp_path: Path, writes: Writes
) -> None:
    """The same process tries it again after a failure of each of its writes."""
    undisturbed, full = (start(vit, photos, tmp_path / name) for name in ("undisturbed", "full"))
    tasks, blobs = rounds(vit)
    full_disk = OSError(errno.ENOSPC, "No space left on device")
    for task in tasks:
        give(undisturbed.device, blobs)
        give(full.device, blobs)
        names = writes.of(partial(perform, undisturbed, task))
        written = [Path(name).name for name in names if "/cache/" not in name and Path(name).name not in FOR_PEOPLE]
        for file in written:
            with (
                writes.failing(lambda _, name, file=file: Path(name).name == file, full_disk),
                pytest.raises(OSError, match="No space left"),
            ):
                perform(full, task)
        perform(full, task)
        assert kept(full.device.store.root, task) == kept(undisturbed.device.store.root, task)
        full.scan()
        is_new = task.stage is Stage.STATISTICS
        assert full.device.scanned.new == (len(full.device.scanned.train) if is_new else 0)


def test_a_device_that_is_late_gets_the_local_expert_that_it_would_have_in_the_run_also_if_it_is_killed(
    vit: Built, photos: Path, tmp_path: Path, writes: Writes
) -> None:
    tasks, blobs = rounds(vit)
    member, late = (start(vit, photos, tmp_path / name) for name in ("member", "late"))
    for device in (member.device, late.device):
        give(device, blobs)
    for task in tasks:
        if task.stage is Stage.PERSONAL:
            perform(member, task)
    end = tasks[-1].model_copy(update={"round": 9, "stage": Stage.FINISHED, "repetitions": 3})
    killed = writes.failing(lambda _, name: Path(name).name == "personal", Killed(), after=True)
    with killed, pytest.raises(Killed):
        perform(late, end)
    store = late.device.store
    assert store.outbox.session == ""  # so that it begins again when it is started again
    late = start(vit, photos, tmp_path / "late")
    perform(late, end)
    late.scan()
    assert store.personal.read_bytes() == member.device.store.personal.read_bytes()
    assert (store.outbox.session, store.outbox.unacknowledged(SESSION)) == (SESSION, frozenset())
    assert late.device.scanned.new == 0
    assert read_personal_model(store).header.round == 9 and store.results.is_file()


def test_a_full_disk_is_mentioned_once_and_tried_again_after_growing_delays(
    vit: Built, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = start(vit, photos, tmp_path).device
    device.cache.pooled(device.scanned.train, level=1)
    device.store.globals.write(b"required")
    device.store.globals.write(b"obsolete")
    retry = DiskRetry(device.store, device.cache, Backoff(first=3600.0, longest=3600.0))
    for attempt in range(3):
        assert retry.waiting == (attempt > 1)  # the second attempt follows at once
        retry.failed(OSError(errno.ENOSPC, "No space left on device"), {blob_hash(b"required")}, evict=True)
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]
    assert device.cache.used == 0
    assert device.store.globals.read(blob_hash(b"required")) and not device.store.globals.read(blob_hash(b"obsolete"))
    retry.succeeded()
    assert not retry.waiting
    retry.failed(OSError(errno.ENOSPC, "No space left on device"), set(), evict=False)
    assert len(caplog.records) == 2


def test_another_device_with_the_same_images_gives_another_update(vit: Built, photos: Path, tmp_path: Path) -> None:
    """What is compared to the bit above does depend on what is drawn."""
    tasks, blobs = rounds(vit)
    for name in ("one", "two"):
        runner = start(vit, photos, tmp_path / name, name)
        give(runner.device, blobs)
        perform(runner, tasks[1])
    one, two = (unpack(DeviceStore(tmp_path / name).outbox.read(2) or b"", Update)[1] for name in ("one", "two"))
    assert all(one[name].tobytes() != two[name].tobytes() for name in one)
