"""The oracle finds each kind of damage. An oracle that finds nothing would let every fault test pass."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from support.run_oracle import Findings, Reference, examine, reference

from benchmarks.layouts import update_of
from benchmarks.simulated import device_names
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.protocol.messages import DeviceStatus, Stage
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import blob_hash, pack
from trainer_server.config import Head, RunConfig
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import ClockTicked, Event, StatusSeen, StoreRound, UpdateSeen
from trainer_server.coordinator.state import Key, State, initial_state
from trainer_server.service.lifecycle import make_plan
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.origin import Origin
from trainer_server.storage.run_store import DATABASE, RunStore

DEVICES = device_names(3)
SAL = Sal(CapabilityQueue(3, 0.02), max_level=1)


def run_without_a_network(out: Path, bundle: TaskBundle) -> None:
    """Writes the folder of a finished run."""
    config = RunConfig(
        run="r",
        devices=3,
        stage1_rounds=2,
        stage2_rounds=1,
        stage1_sal=SAL,
        stage2_sal=SAL,
        audit=True,
        secure_sums=False,
        head=Head.CLASS_MEANS,
    )
    task = bundle.task
    origin = Origin(config=config, session="s", bundle=bundle.root, sha256=bundle.sha256, task=task.sha256)
    store = RunStore.create(out, origin, task)
    plan = make_plan(store, bundle)
    state = initial_state(plan, 0.0)

    def happens(state: State, event: Event) -> State:
        state, commands = advance(plan, state, event, 0.0)
        closed = [command.closed for command in commands if isinstance(command, StoreRound)]
        store.commit([LoggedEvent(0.0, event)], closed)
        if isinstance(event, ClockTicked):
            store.save_checkpoint(state, 0.0)
        return state

    for name in DEVICES:
        state = happens(state, StatusSeen(DeviceStatus(device=name, online=True, bundle=bundle.sha256)))
    state = happens(state, ClockTicked())
    while state.announced and state.announced.stage is not Stage.FINISHED:
        for name in DEVICES:
            update, tensors = update_of(bundle, name, state.announced, 1)
            blob = pack(update, tensors)
            (store.blobs.folder / blob_hash(blob)).write_bytes(blob)
            state = happens(state, UpdateSeen(update, tensors, blob_hash(blob), len(blob)))
        state = happens(state, ClockTicked())
    store.close()


@pytest.fixture(scope="module")
def finished(layout: TaskBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run_without_a_network(out, layout)
    return out


EVERYTHING: set[Key] = {(round_, device) for round_ in range(1, 7) for device in DEVICES}


def after(change: str, finished: Path, tmp_path: Path, told: set[Key] = EVERYTHING) -> Findings:
    """The findings after SQL has changed the server's database."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with sqlite3.connect(out / DATABASE) as db:
        db.executescript(change)
    return examine(out, told, reference(finished))


def test_a_run_without_a_fault_has_no_findings(finished: Path, tmp_path: Path) -> None:
    assert after("", finished, tmp_path) == Findings(0, 0, 0, recomputed=7, compared=7, missing={})


def test_an_acknowledged_update_that_is_not_stored_is_lost(finished: Path, tmp_path: Path) -> None:
    assert after("", finished, tmp_path, {*EVERYTHING, (3, "device-0009")}).lost == 1


def test_an_update_that_is_in_the_log_twice_is_double(finished: Path, tmp_path: Path) -> None:
    again = (
        "INSERT INTO events (at, kind, body, sha256, size) SELECT at, kind, body, sha256, size FROM events "
        "WHERE kind = 'update' ORDER BY seq DESC LIMIT 1"
    )
    assert after(again, finished, tmp_path).double == 1


def test_an_update_that_is_missing_in_the_event_log_is_found(finished: Path, tmp_path: Path) -> None:
    """The record of its round still has it."""
    findings = after(
        "DELETE FROM events WHERE seq = (SELECT min(seq) FROM events WHERE kind = 'update')", finished, tmp_path
    )
    assert findings.lost == 1
    assert findings.double > 0


def test_a_round_with_another_result_is_found(finished: Path, tmp_path: Path) -> None:
    with sqlite3.connect(finished / DATABASE) as db:
        (record,) = db.execute("SELECT record FROM rounds WHERE round = 3").fetchone()
    changed = json.loads(record)
    changed["round"]["expert"] = "0" * 64
    findings = after(f"UPDATE rounds SET record = '{json.dumps(changed)}' WHERE round = 3", finished, tmp_path)
    assert findings.double == 3  # in the replay, in the replay in another order, and against the undisturbed run


def test_a_missing_device_ends_the_comparison_and_not_the_recomputation(finished: Path, tmp_path: Path) -> None:
    known = reference(finished)
    findings = examine(finished, EVERYTHING, Reference(known.devices | {"device-0009"}, known.outcomes))
    assert (findings.double, findings.recomputed, findings.compared) == (0, 7, 1)
