"""The server's files: it can be killed at any time and resumes in the same state."""

from __future__ import annotations

import errno
import json
import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built
from support.coordinators import ABC, CoordinatorRun, make_update, plan_for
from support.offline_server import OfflineServer
from support.training_contexts import announced_round

from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.messages import Globals, Stage
from fedfmsl.protocol.task import Task
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import blob_hash, pack
from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import ClockTicked, OperatorActed, StatusSeen, Stop, StoreRound
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.state import State
from trainer_server.service.lifecycle import make_plan, open_bundle, open_run, replay_rounds, restore_state
from trainer_server.storage import checkpoint, round_records
from trainer_server.storage.checkpoint import Checkpoint, vectors_of
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.run_store import DATABASE, RunStore


def same(one: State, other: State) -> bool:
    vectors = [{name: tensor.tobytes() for name, tensor in vectors_of(state).items()} for state in (one, other)]
    return vectors[0] == vectors[1] and Checkpoint.of(one) == Checkpoint.of(other) and one.updates == other.updates


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def opened(vit: Built, folder: Path, **config: object) -> OfflineServer:
    settings = plan_for(vit, stage1_rounds=2, stage2_rounds=1, **config).config
    store = open_run(folder, settings, vit.bundle)
    return OfflineServer(store, make_plan(store, vit.bundle))


def run_to_its_end(server: OfflineServer, nll: Callable[[State], float] = lambda _: 1.0) -> Iterator[OfflineServer]:
    """Restarts the server from its folder after every event, and yields the new one. `nll`: what devices report."""
    folder, bundle = server.store.folder, server.plan.bundle
    todo = list(server.joins())
    while server.store.ended is None:
        for event in todo:
            server.feed(event)
            before = server.state
            server.store.close()
            store = RunStore(folder)
            server = OfflineServer(store, make_plan(store, bundle))
            assert same(server.state, before)
            yield server
        todo = list(server.answers(nll(server.state)))


@pytest.mark.parametrize("audit", [False, True])
def test_a_server_killed_after_any_event_resumes_in_the_same_state(
    vit: Built, folder: Path, audit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PIECE", 2)  # a checkpoint of three devices has several pieces
    for server in run_to_its_end(opened(vit, folder, audit=audit)):
        last = server
    undisturbed = CoordinatorRun(replace(last.plan, read=plan_for(vit).read))
    undisturbed.online(*ABC)
    undisturbed.until_stop(ABC)
    assert last.store.ended == "finished"
    assert last.state.expert.tobytes() == undisturbed.state.expert.tobytes()
    assert last.state.gate.tobytes() == undisturbed.state.gate.tobytes()
    assert [c.round.round for c in last.store.rounds.all()] == list(range(1, 7))


def of_a_poisoned_candidate(state: State) -> float:
    """The likelihood under the candidates that the second round of stage 1 and the canaries measure is bad."""
    assert state.announced is not None
    measured = (state.announced.stage, state.announced.index) in ((Stage.GLOBAL, 1), (Stage.CANARY, 0))
    return 9.0 if measured and state.made != state.good.round else 1.0


def test_a_server_killed_at_any_step_of_a_rejection_goes_on_with_the_last_good_global_expert(
    vit: Built, folder: Path
) -> None:
    for server in run_to_its_end(opened(vit, folder, audit=True, canary="3"), of_a_poisoned_candidate):
        last = server
    undisturbed = CoordinatorRun(replace(last.plan, read=plan_for(vit).read))
    undisturbed.online(*ABC)
    while not undisturbed.of(Stop):
        undisturbed.answers(ABC, nll=of_a_poisoned_candidate(undisturbed.state))
    assert last.state.expert.tobytes() == undisturbed.state.expert.tobytes()
    rejected = [closed.round.stage for closed in last.store.rounds.all() if closed.rejected]
    assert rejected == 2 * [Stage.GLOBAL, Stage.CANARY]  # the canaries reject the head of sums, so stage 1 is repeated
    again = list(replay_rounds(last.store, last.plan))
    assert again[:-1] == [closed.round for closed in last.store.rounds.all()]


def test_a_finished_run_that_is_rolled_back_goes_on_and_can_be_killed_and_replayed(vit: Built, folder: Path) -> None:
    for server in run_to_its_end(opened(vit, folder, audit=True)):
        last = server
        if server.state.made == 2 and not KeptExperts(folder).rounds():
            KeptExperts(folder).write(2, server.state.expert)
            expert = server.state.expert.tobytes()
    assert last.state.expert.tobytes() != expert
    sha256 = KeptExperts(folder).copy(2, last.store.blobs.folder)
    event = OperatorActed(Operation(action=Action.ROLLBACK, round=2, sha256=sha256))
    last.now += 1.0
    state, _ = advance(last.plan, last.state, event, last.now)
    last.store.commit([LoggedEvent(last.now, event)], reopens=True)
    again = OfflineServer(RunStore(folder), last.plan)
    assert again.store.ended is None and again.state.rollback == state.rollback
    again.feed(ClockTicked())
    assert again.state.announced is not None and again.state.announced.stage is Stage.PERSONAL
    while again.store.ended is None:
        for each in again.answers(1.0):
            again.feed(each)
    assert again.state.expert.tobytes() == expert
    replayed = {announced.round: announced for announced in replay_rounds(again.store, again.plan)}
    assert [replayed[closed.round.round] for closed in again.store.rounds.all()] == [
        closed.round for closed in again.store.rounds.all()
    ]


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_whole(vit: Built, folder: Path) -> None:
    server = opened(vit, folder)
    for event in server.joins():
        server.feed(event)
    reader, replaced = RunStore(folder), []

    def replace_it(statement: str) -> None:
        if "FROM checkpoint_pieces" in statement and not replaced:
            replaced.append(statement)
            for event in server.answers():
                server.feed(event)

    reader._db.set_trace_callback(replace_it)
    found = reader.checkpoint()
    assert found is not None and replaced and server.state.round == 2
    assert {status.device for status in found[0].devices} == {*ABC} and found[0].round == 1


def test_the_disk_holds_only_what_the_present_round_needs(vit: Built, folder: Path) -> None:
    most = max(len(list(server.store.blobs.folder.iterdir())) for server in run_to_its_end(opened(vit, folder)))
    assert most == 1 + len(ABC)  # the checkpoint and the round's updates


def test_a_replay_of_an_audited_run_is_bit_identical(vit: Built, folder: Path) -> None:
    for server in run_to_its_end(opened(vit, folder, audit=True)):
        last = server
    again = list(replay_rounds(last.store, last.plan))
    assert again[:-1] == [closed.round for closed in last.store.rounds.all()]
    assert again[-1] == last.state.announced
    assert again[-1].stage is Stage.FINISHED


def test_the_folder_of_a_run_is_not_a_file(vit: Built, folder: Path) -> None:
    folder.write_text("")
    for use in (RunStore, lambda path: open_run(path, plan_for(vit).config, vit.bundle)):
        with pytest.raises(ConfigError, match=f"--out {folder} is a file; pass a folder"):
            use(folder)


def test_an_audited_run_keeps_only_its_latest_rounds_and_replays_them(vit: Built, folder: Path) -> None:
    whole = dict.fromkeys(("events", "tensors"), 0)
    for server in run_to_its_end(opened(vit, folder, audit=True, keep_rounds=2)):
        last = server
        whole["tensors"] = max(whole["tensors"], len(list(server.store.blobs.folder.iterdir())))
    assert whole["tensors"] <= 3 + 3 * len(ABC)  # three checkpoints, and the updates of two rounds and the present one
    again = list(replay_rounds(last.store, last.plan))
    assert [announced.round for announced in again] == [6, 7]
    assert again[:-1] == [closed.round for closed in last.store.rounds.all()][-1:]
    assert again[-1] == last.state.announced
    assert [closed.round.round for closed in last.store.rounds.all()] == [5, 6]


def test_records_of_old_rounds_have_no_values_of_single_devices(
    vit: Built, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_records, "DETAILS", 2 * len(ABC))  # of two rounds
    for server in run_to_its_end(opened(vit, folder, devices=len(ABC))):
        last = server
    closed = last.store.rounds.all()
    assert [bool(record.updates and record.bytes_up) for record in closed] == [False] * 4 + [True] * 2
    assert [record.round.round for record in closed] == list(range(1, 7))
    counts, rounds = last.store.rounds.participation()
    assert counts == dict.fromkeys(ABC, rounds)


def test_ten_thousand_rounds_of_a_thousand_devices_fit_on_a_small_disk(
    vit: Built, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two detailed rounds stand for the 500 that are kept; the others have one size, whatever the devices."""
    names, detailed = tuple(f"device-{index:04}" for index in range(1000)), round_records.DETAILS // 1000
    monkeypatch.setattr(round_records, "DETAILS", 2 * len(names))
    server = opened(vit, folder, devices=len(names))
    metrics = dict.fromkeys(("loss", "held_out_global", "held_out_mofm", "held_out_local", "gate_entropy"), 0.12345678)
    run, round_ = CoordinatorRun(server.plan), announced_round(Stage.GLOBAL, chosen=names)
    update = make_update(run.plan, round_, names[0], samples=100, metrics=metrics).update
    updates = {name: update.model_copy(update={"device": name}) for name in names}
    missing = tuple(f"absent-{index:04}" for index in range(500))
    for number in range(1, 6):
        closed = round_.model_copy(update={"round": number})
        record = ClosedRound(
            round=closed, seconds=60.0, updates=updates, bytes_up=dict.fromkeys(names, 50_000), missing=missing
        )
        server.store.commit([], [record])
    sizes = [len(record.model_dump_json()) for record in server.store.rounds.all()]
    assert len(set(sizes[:3])) == 1 and sizes[0] < 2000 < sizes[3] == sizes[4]
    assert 10_000 * sizes[0] + detailed * sizes[4] < 300e6  # bytes
    assert server.store.rounds.counts() == {(Stage.GLOBAL, False): 5}


def test_a_run_without_an_audit_cannot_be_replayed(vit: Built, folder: Path) -> None:
    server = opened(vit, folder)
    with pytest.raises(RunError, match="without --audit"):
        list(replay_rounds(server.store, server.plan))


def test_a_crash_between_event_and_checkpoint_loses_nothing(vit: Built, folder: Path) -> None:
    """The event that closes a round is stored, the checkpoint after it is not."""
    server = opened(vit, folder)
    for event in (*(StatusSeen(CoordinatorRun(server.plan).status(name)) for name in ABC), ClockTicked()):
        server.feed(event)
    for device in ABC:
        server.feed(make_update(server.plan, server.state.announced, device))
    state, commands = advance(server.plan, server.state, ClockTicked(), server.now)
    server.store.commit(
        [LoggedEvent(server.now, ClockTicked())], [c.closed for c in commands if isinstance(c, StoreRound)]
    )
    server.store.close()
    store = RunStore(folder)
    successor, _ = restore_state(store, make_plan(store, vit.bundle))
    assert successor.round == 2
    assert same(successor, state)


def test_a_commit_is_atomic(vit: Built, folder: Path) -> None:
    server = opened(vit, folder)
    event = LoggedEvent(1.0, StatusSeen(CoordinatorRun(server.plan).status("a")))
    unstorable = {("a", "kind"): (2**70, "an integer that SQLite cannot hold")}
    with pytest.raises(OverflowError):
        server.store.commit([event], refusals=unstorable)
    assert list(server.store.events()) == []
    server.store.commit([event])
    assert list(server.store.events()) == [event]


def test_refusals_are_added_up(vit: Built, folder: Path) -> None:
    store = opened(vit, folder).store
    store.commit([], refusals={("a", "late"): (2, "round 1"), ("b", "tensors"): (1, "nan")})
    store.commit([], refusals={("a", "late"): (3, "round 2")})
    assert [(r.device, r.kind, r.count, r.last) for r in store.refusals.all()] == [
        ("a", "late", 5, "round 2"),
        ("b", "tensors", 1, "nan"),
    ]


# errors


def test_only_one_server_works_in_a_folder(vit: Built, folder: Path) -> None:
    first, second = opened(vit, folder).store, RunStore(folder)
    with first.files.locked(), pytest.raises(RunError, match="another server runs in"), second.files.locked():
        pass
    with second.files.locked():
        pass


def test_settings_that_differ_from_the_runs_are_named(vit: Built, folder: Path) -> None:
    server = opened(vit, folder)
    server.feed(StatusSeen(CoordinatorRun(server.plan).status("a")))
    other = plan_for(vit, stage1_rounds=3, max_repeats=2, enough=0.5).config
    settings = "--stage1-rounds 2, not 3; .*--max-repeats none, not 2; --enough 1.0, not 0.5"
    with pytest.raises(ConfigError, match=settings) as caught:
        open_run(folder, other, vit.bundle)
    assert f"trainer_server resume --max-repeats 2 --enough 0.5 --out {folder}, or" in str(caught.value)


def test_a_run_without_events_can_be_started_with_other_settings(vit: Built, dinov2: Built, folder: Path) -> None:
    """For example after a start without a broker."""
    session = opened(vit, folder).store.origin.session
    config = plan_for(vit, stage1_rounds=9).config
    open_run(folder, config, dinov2.bundle).close()
    origin = RunStore(folder).origin
    assert (origin.config, origin.sha256, origin.session) == (config, dinov2.bundle.sha256, session)


def test_a_bundle_that_differs_from_the_runs_is_refused(vit: Built, dinov2: Built, folder: Path) -> None:
    server = opened(vit, folder)
    server.feed(StatusSeen(CoordinatorRun(server.plan).status("a")))
    with pytest.raises(ConfigError, match="another bundle"):
        open_run(folder, server.plan.config, dinov2.bundle)
    assert open_bundle(server.store).sha256 == vit.bundle.sha256


def test_an_update_on_a_disk_that_fails_is_read_later(
    vit: Built, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(vit, folder).store
    place = store.blobs.updates.append(blob := pack(Globals(run="r", kind="gate"), {"values": np.ones(3, np.float32)}))
    store.blobs.place({blob_hash(blob): place})

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(os, "pread", fail)
        store.blobs.read(blob_hash(blob))
    assert store.blobs.read(blob_hash(blob))["values"].tolist() == [1, 1, 1]


def test_a_missing_or_altered_update_is_named(vit: Built, folder: Path) -> None:
    server = opened(vit, folder)
    for event in (*(StatusSeen(CoordinatorRun(server.plan).status(name)) for name in ABC), ClockTicked()):
        server.feed(event)
    update = make_update(server.plan, server.state.announced, "a")
    server.feed(update)
    path = server.store.blobs.folder / update.sha256
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(RunError, match=f"{update.sha256} was altered"):
        restore_state(server.store, server.plan)
    path.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        restore_state(server.store, server.plan)
    path.write_bytes(whole)
    assert same(restore_state(server.store, server.plan)[0], server.state)


def test_without_a_free_descriptor_an_update_is_not_called_missing(vit: Built, folder: Path) -> None:
    server = opened(vit, folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            server.store.blobs.read("0" * 64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(taken)


def test_a_folder_without_a_valid_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run at"):
        RunStore(tmp_path)
    (tmp_path / DATABASE).write_bytes(b"x" * 5000)
    with pytest.raises(RunError, match="cannot be read"):
        RunStore(tmp_path)
    (tmp_path / DATABASE).unlink()
    sqlite3.connect(tmp_path / DATABASE).close()
    with pytest.raises(RunError, match="cannot be read"):
        RunStore(tmp_path)


def test_a_run_of_an_earlier_version_is_refused(vit: Built, folder: Path) -> None:
    open_run(folder, plan_for(vit).config, vit.bundle).close()
    with sqlite3.connect(folder / DATABASE) as db:
        db.execute("PRAGMA user_version = 1")
    with pytest.raises(RunError, match=r"another version \(format 1, .* start a new run with another --out"):
        RunStore(folder)


def test_a_run_without_a_task_is_refused(vit: Built, folder: Path) -> None:
    """As before the class list left the bundle."""
    store = open_run(folder, plan_for(vit).config, vit.bundle)
    former = store.origin.model_dump(mode="json", exclude={"task"})
    store.close()
    with sqlite3.connect(folder / DATABASE) as db:
        db.execute("UPDATE run SET origin = ?", (json.dumps(former),))
    with pytest.raises(RunError, match=r"without a task; export its bundle again .*, and start a new run"):
        RunStore(folder)


def test_a_run_keeps_its_task(vit: Built, folder: Path) -> None:
    config = plan_for(vit).config
    store = open_run(folder, config, vit.bundle)
    other = TaskBundle(vit.bundle, Task(vit.bundle.sha256, ("fig", "quince")))
    open_run(folder, config, other).close()  # nothing has happened in the run yet
    assert RunStore(folder).task().classes == ("fig", "quince")
    store = open_run(folder, config, vit.bundle)
    store.commit([LoggedEvent(0.0, ClockTicked())])
    with pytest.raises(ConfigError, match=r"holds run 'r' with another task \(4 classes: 'apple', .*choose another"):
        open_run(folder, config, other)
    (folder / "tasks" / store.origin.task).write_bytes(other.task.blob)
    with pytest.raises(RunError, match="was altered"):
        store.task()


def test_the_folder_of_a_run_belongs_to_its_owner(vit: Built, folder: Path) -> None:
    config = plan_for(vit).config
    open_run(folder, config, vit.bundle)
    assert folder.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_written_is_one_clear_error(vit: Built, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        open_run(tmp_path / "file" / "run", plan_for(vit).config, vit.bundle)
