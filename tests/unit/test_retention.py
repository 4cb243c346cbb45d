"""What a server and a device keep over 10,000 rounds is bounded: files, records, and what is read of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.bundles import Built
from support.coordinators import ABC, CoordinatorRun, make_update, plan_for
from support.stored_runs import closed_round

from edge_runtime.daemon.state import State, WorkDone, advance
from edge_runtime.data import ledger
from edge_runtime.data.ledger import open_ledger
from edge_runtime.data.samples import Sample, Splits
from edge_runtime.store import DeviceStore
from edge_runtime.store.outbox import UNACKNOWLEDGED
from fedfmsl.common import files
from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import Stage
from fedfmsl.protocol.tensors import pack
from trainer_server.console.snapshot import RunReader
from trainer_server.coordinator.events import ClockTicked
from trainer_server.coordinator.privacy_budget import NoisedRounds
from trainer_server.service.lifecycle import open_run
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.run_status import sizes_of
from trainer_server.storage.run_store import DATABASE, RunStore

ROUNDS, BATCH, KEPT = 10_000, 500, 600


@pytest.fixture(autouse=True)
def _without_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power failures are not tested here, and a sync takes longer than all the rest."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)


def opened(vit: Built, folder: Path) -> tuple[RunStore, CoordinatorRun]:
    plan = plan_for(vit, keep_rounds=KEPT)
    store = open_run(folder, plan.config, vit.bundle)
    run = CoordinatorRun(plan)
    run.online(*ABC)
    return store, run


def batches(store: RunStore, run: CoordinatorRun) -> Iterator[int]:
    """Closes BATCH rounds at a time. Every fifth round is repeated."""
    one = closed_round("r", 1, ROUNDS, ABC)
    for last in range(BATCH, ROUNDS + 1, BATCH):
        closed = [
            one.model_copy(
                update={
                    "round": one.round.model_copy(update={"round": number}),
                    "repeated": "" if number % 5 else "too few",
                }
            )
            for number in range(last - BATCH + 1, last + 1)
        ]
        update = make_update(run.plan, run.announced, ABC[last // BATCH % 3])
        files.write_atomically(store.blobs.folder / update.sha256, pack(update.update, update.tensors))
        store.commit([LoggedEvent(float(last), event) for event in (update, ClockTicked())], closed)
        store.save_checkpoint(run.state, float(last))
        yield last


def test_a_server_keeps_its_latest_rounds_and_counts_all(vit: Built, tmp_path: Path) -> None:
    store, run = opened(vit, tmp_path / "run")
    reader, sizes = RunReader("r", tmp_path / "run"), {}
    for last in batches(store, run):
        if last in (2000, ROUNDS):
            with closing(sqlite3.connect(store.folder / DATABASE)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else the size depends on how full the log is
            sizes[last] = sizes_of(store)
            assert [each.round.round for each in store.rounds.all()] == list(range(last - KEPT + 1, last + 1))
            assert len(reader.snapshot().closed) <= KEPT
    assert sizes[ROUNDS]["database"] < 1.1 * sizes[2000]["database"]
    assert sizes[ROUNDS]["tensors"] == sizes[2000]["tensors"]
    counts = store.rounds.counts()
    assert counts == {(Stage.GLOBAL, False): ROUNDS * 4 // 5, (Stage.GLOBAL, True): ROUNDS // 5}
    assert NoisedRounds.of(counts, {}) == NoisedRounds(sent=ROUNDS, released=ROUNDS * 4 // 5)
    assert store.rounds.repetitions() == ["too few"] * (KEPT // 5)


def test_a_device_that_no_server_acknowledges_keeps_its_latest_updates(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    state = State(device="a", guard=DuplicateNameGuard("x"), bundle="b")
    store.outbox.enter("s", "r")
    for number in range(1, ROUNDS + 1):
        state, _ = advance(state, WorkDone(number))
        if number > ROUNDS - 3 * UNACKNOWLEDGED:  # earlier ones would take the same way, slowly
            store.outbox.write(number, b"update")
    latest = set(range(ROUNDS - UNACKNOWLEDGED + 1, ROUNDS + 1))
    assert {int(path.name) for path in store.outbox.folder.iterdir()} == latest == state.unacknowledged
    assert store.sizes() == {"bundles": 0, "updates": UNACKNOWLEDGED * len(b"update"), "other": len("s 0 r")}


def test_the_splits_of_photos_that_are_gone_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "ABSENT", 100)
    path = tmp_path / "samples.sqlite"
    for night in range(30):
        new = [Sample(Path("x"), f"{night:032}{number:032}", 0, 1) for number in range(20)]
        with open_ledger(path) as book:
            book.keep_splits(Splits(tuple(new[:16]), tuple(new[16:18]), tuple(new[18:])))
    with sqlite3.connect(path) as db:
        kept = [sha256 for (sha256,) in db.execute("SELECT sha256 FROM slices ORDER BY place")]
    assert len(kept) == 120
    assert kept[-1] == new[-1].sha256 and kept[0].startswith(f"{night - 5:032}")
