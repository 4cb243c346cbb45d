"""Blobs of accepted updates in files of many, and the store that finds them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built
from support.coordinators import CoordinatorRun, make_update, plan_for

from fedfmsl.errors import RunError
from fedfmsl.protocol.tensors import blob_hash, pack
from trainer_server.coordinator.events import ClockTicked, StatusSeen, UpdateSeen
from trainer_server.service.lifecycle import open_run
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.run_store import RunStore
from trainer_server.storage.update_files import Place, UpdateFiles

BLOBS = [np.random.default_rng(seed).bytes(5 + 1000 * seed) for seed in range(4)]


def test_blobs_are_read_as_they_were_written_and_a_new_file_begins_after_a_checkpoint(tmp_path: Path) -> None:
    files = UpdateFiles(tmp_path)
    assert not [*tmp_path.iterdir()]
    places = [files.append(blob) for blob in BLOBS[:2]]
    files.sync()
    files.begin()
    places += [files.append(blob) for blob in BLOBS[2:]]
    assert [place.file for place in places] == [1, 1, 2, 2]
    assert [files.read(place) for place in reversed(places)] == BLOBS[::-1]
    assert files.read(Place(1, 0, 10**6)) == b"".join(BLOBS[:2])
    files.close()
    again = UpdateFiles(tmp_path)  # a restarted server writes into none of them
    assert again.append(BLOBS[0]) == Place(3, 0, len(BLOBS[0]))
    assert again.read(places[3]) == BLOBS[3]
    for path in tmp_path.iterdir():
        path.unlink()
    others = UpdateFiles(tmp_path)  # use the numbers again
    others.append(BLOBS[0])
    others.begin()
    assert again.read(others.append(BLOBS[1])) == BLOBS[1]


def accepted(store: RunStore, run: CoordinatorRun, names: str) -> list[UpdateSeen]:
    updates = [make_update(run.plan, run.announced, name) for name in names]
    blobs = {seen.sha256: store.blobs.updates.append(pack(seen.update, seen.tensors)) for seen in updates}
    store.commit([LoggedEvent(0.0, seen) for seen in updates], blobs=blobs)
    return updates


def test_after_a_failed_sync_blobs_go_to_a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    files = UpdateFiles(tmp_path)
    assert files.append(BLOBS[0]).file == 1
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match="Input/output error"):
            files.sync()
    place = files.append(BLOBS[1])
    files.sync()
    assert place.file == 2 and files.read(place) == BLOBS[1]
    files.close()


def test_the_store_finds_updates_until_a_checkpoint_and_names_an_altered_one(vit: Built, tmp_path: Path) -> None:
    run = CoordinatorRun(plan_for(vit))
    run.feed(*(StatusSeen(run.status(name)) for name in "abc"), ClockTicked())
    store = open_run(tmp_path / "run", run.plan.config, vit.bundle)
    store.save_checkpoint(run.state, 0.0)
    orphan = store.blobs.updates.append(b"of a batch that was not committed")
    first, *_ = accepted(store, run, "ab")
    again = RunStore(store.folder)
    assert [logged.event for logged in again.events()] and blob_hash(pack(first.update, first.tensors)) == first.sha256
    assert np.array_equal(again.blobs.read(first.sha256)["class_sums"], first.tensors["class_sums"])
    path = store.blobs.folder / UpdateFiles.name(orphan.file)
    whole = path.read_bytes()
    path.write_bytes(whole[: orphan.size + 200] + b"x" + whole[orphan.size + 201 :])
    with pytest.raises(RunError, match=f"{path.name} was altered"):
        RunStore(store.folder).blobs.read(first.sha256)
    store.save_checkpoint(run.state, 1.0)
    assert not path.exists() and len([*store.blobs.folder.iterdir()]) == 1
    with pytest.raises(RunError, match="cannot be read"):
        store.blobs.read(first.sha256)
