"""Deleted samples that training goes on with, with --rehearse."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built
from support.in_process_daemon import make_daemon, no_report
from support.samples import CLASSES
from support.training_contexts import SAL, announced_round, initial_globals

from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.daemon.status import describe
from edge_runtime.data.folder import SampleFolder
from edge_runtime.data.ledger import open_ledger
from fedfmsl.algorithms.sal import AllAtOnce, Sal
from fedfmsl.protocol.messages import Activity, Globals, Health, Round, Stage, Update
from fedfmsl.protocol.tensors import blob_hash, pack, unpack

GONE = CLASSES[0]


class Device:
    """A device with --rehearse that computes rounds of stage 1."""

    def __init__(self, built: Built, photos: Path, folder: Path, rehearse: int) -> None:
        self.photos = shutil.copytree(photos, folder / "photos")
        self.bundle, self.round = built.bundle, 0
        self._daemon = make_daemon(built, self.photos, folder / "state")
        self.start(rehearse)

    def start(self, rehearse: int) -> None:
        device, before = self._daemon.device, self._daemon.runner
        samples = SampleFolder(self.photos, self.bundle, device.store, run="r")
        self.runner = RoundRunner(device, samples, before.control, before.tracker, no_report, rehearse=rehearse)

    def train(self, level: int = 1, stage: Stage = Stage.GLOBAL, sal: Sal = SAL) -> Update:
        """The header of the update of the next round."""
        self.run(level, stage, sal)
        blob = self.runner.device.store.outbox.read(self.round)
        assert blob is not None
        return unpack(blob, Update)[0]

    def run(self, level: int, stage: Stage, sal: Sal = SAL) -> None:
        """Computes the next round."""
        store, named = self.runner.device.store, {}
        values = initial_globals(self.bundle, level)
        for kind in ("expert", "start", "gate"):
            layout = self.bundle.gate if kind == "gate" else self.bundle.expert
            blob = pack(Globals(run="r", kind=kind), layout.split(getattr(values, kind)))
            store.globals.write(blob)
            named[kind] = blob_hash(blob)
        self.round += 1
        announced = announced_round(stage, level, round=self.round, **named)
        round_ = Round.model_validate({**announced.model_dump(), "sal": sal})
        self.runner.scan()
        self.runner.run(round_, bytes_down=0)

    def delete(self, name: str) -> None:
        for path in self.photos.rglob(f"{name}/*"):
            path.unlink()

    def kept(self) -> Counter[str]:
        """How many samples the ledger keeps, by class."""
        with open_ledger(self.runner.device.store.samples) as ledger:
            return Counter(name for _, name in ledger.kept_for_rehearsal())


@pytest.mark.parametrize(("rehearse", "kept"), [(0, 0), (1, 1), (100, None)])
def test_training_goes_on_with_deleted_samples(
    vit: Built, photos: Path, tmp_path: Path, rehearse: int, kept: int
) -> None:
    device = Device(vit, photos, tmp_path, rehearse)
    first = device.train()
    labels = [device.bundle.classes[sample.label] for sample in device.runner.device.splits.train]
    before = Counter(labels)
    assert before[GONE] > 1
    device.delete(GONE)
    expected = before[GONE] if kept is None else kept
    for _ in range(2):  # and on
        assert device.train().samples == first.samples - before[GONE] + expected
        assert device.kept()[GONE] == expected
    device.runner.device.cache.evict_all()  # the files cannot be read again
    assert device.train().samples == first.samples - before[GONE]
    assert device.kept()[GONE] == 0


def test_a_device_that_personalizes_itself_alone_rehearses_and_status_shows_it(
    vit: Built, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(vit, photos, tmp_path, rehearse=2)
    device.train()
    device.delete(GONE)
    monkeypatch.setattr(device.runner, "write_personalized", lambda: None)
    device.run(level=1, stage=Stage.FINISHED)
    assert device.kept()[GONE] == 2
    assert device.train().samples == len(device.runner.device.splits.train) + 2
    health = Health(device="d", time=1.0, started=1.0, activity=Activity.WAITING)
    shown = dict(describe(health, device.runner.device.store, now=2.0))
    assert shown["rehearsal"] == "2 deleted samples are trained with (--rehearse)"


def test_rehearsal_that_is_switched_off_forgets_the_samples(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = Device(vit, photos, tmp_path, rehearse=2)
    device.train()
    device.delete(GONE)
    device.train()
    gone = {sha256 for sha256, name in _ledger(device) if name == GONE}
    device.start(rehearse=0)
    device.train()
    assert not _ledger(device)
    stored = {path.name for path in device.runner.device.store.cache.rglob("*")}
    assert gone and not gone & stored


def _ledger(device: Device) -> list[tuple[str, str]]:
    with open_ledger(device.runner.device.store.samples) as ledger:
        return ledger.kept_for_rehearsal()


def test_a_higher_level_uses_the_states_that_were_computed_ahead(vit: Built, photos: Path, tmp_path: Path) -> None:
    device = Device(vit, photos, tmp_path, rehearse=100)
    first = device.train(level=1)
    device.delete(GONE)
    assert device.train(level=2).samples == first.samples
    assert np.isfinite(device.train(level=2, stage=Stage.PERSONAL).metrics["held_out_mofm"])


def test_a_sample_without_a_state_at_the_local_experts_level_is_dropped(
    vit: Built, photos: Path, tmp_path: Path
) -> None:
    device = Device(vit, photos, tmp_path, rehearse=100)
    device.train(level=1)
    device.delete(GONE)
    cache = device.runner.device.cache
    for path in device.runner.device.store.cache.glob("*-level-2/*"):  # as if the disk had no space for them
        cache._store._remove(path.parent.name, path.name)
    device.train(level=1, stage=Stage.PERSONAL, sal=Sal(AllAtOnce(), max_level=2))
    assert device.kept()[GONE] == 0
