"""The server's commands that only read a run, at three times of a run."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from support.bundles import Built
from support.coordinators import PRIVACY, CoordinatorRun, make_update, plan_for
from support.samples import CLASSES
from support.stored_runs import closed_round
from typer.testing import CliRunner

from fedfmsl.algorithms.accounting import gaussian_epsilon
from fedfmsl.algorithms.sal import AllAtOnce, Sal
from fedfmsl.errors import RunError
from fedfmsl.protocol.messages import MAX_ADDED
from fedfmsl.protocol.tensors import pack
from trainer_server.__main__ import app
from trainer_server.config import Aggregation, Rule
from trainer_server.coordinator.events import OperatorActed, StatusSeen, StoreRound
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.refusals import LEFT_OUT_AFTER, LEFT_OUT_ROUNDS
from trainer_server.service.lifecycle import open_run
from trainer_server.service.run_log import log_operator_state
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.observations import Observations, ServerView
from trainer_server.storage.operations import Operations
from trainer_server.storage.run_status import paused_and_excluded
from trainer_server.storage.run_store import RunStore


@pytest.fixture
def run(vit: Built) -> CoordinatorRun:
    return CoordinatorRun(plan_for(vit, devices=2, audit=True))


@pytest.fixture
def store(run: CoordinatorRun, vit: Built, tmp_path: Path) -> RunStore:
    return open_run(tmp_path / "run", run.plan.config, vit.bundle)


def show(store: RunStore, *arguments: str) -> str:
    command, *options = arguments
    shown = CliRunner().invoke(app, [command, "--out", str(store.folder), *options])
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def rows(store: RunStore) -> dict[str, str]:
    lines = (line.rstrip().partition("  ") for line in show(store, "status").splitlines())
    return {label.strip(): text.strip() for label, _, text in lines}


def as_json(store: RunStore) -> dict[str, object]:
    facts: dict[str, object] = json.loads(show(store, "status", "--json"))
    return facts


def test_before_the_first_round_status_shows_the_devices_that_are_online(store: RunStore) -> None:
    assert rows(store)["online"] == "0 of 2 devices"
    store.files.save_joined({"dev-a"})
    assert rows(store)["online"] == "1 of 2 devices: dev-a"
    assert as_json(store).items() >= {"online": ["dev-a"], "devices": 2}.items()
    assert not {"round", "stage", "ended"} & rows(store).keys()
    assert rows(store)["privacy"] == "none was asked for (--dp-noise)"


def test_during_a_round_status_shows_its_stage_and_the_missing_devices(run: CoordinatorRun, store: RunStore) -> None:
    run.online("a", "b")
    store.commit([LoggedEvent(0.0, StatusSeen(run.status(name))) for name in ("a", "b")])
    store.save_checkpoint(run.state, 0.0)
    update = make_update(run.plan, run.announced, "a")
    (store.blobs.folder / update.sha256).write_bytes(pack(update.update, update.tensors))
    store.commit([LoggedEvent(1.0, update)])
    shown = rows(store)
    assert shown["stage"] == "statistics, round 1 of 1"
    assert (shown["selected"], shown["answered"], shown["missing"]) == ("2: a, b", "1: a", "1: b")
    assert as_json(store).items() >= {"stage": "statistics", "stage_round": 1, "closed_rounds": 0}.items()


def test_status_and_a_server_that_starts_show_what_the_operator_has_done(
    run: CoordinatorRun, store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    def act(*actions: Action) -> None:
        store.commit([LoggedEvent(0.0, OperatorActed(Operation(action=each, device="b"))) for each in actions])

    run.online("a", "b")
    act(Action.PAUSE, Action.EXCLUDE)
    assert rows(store)["paused"].startswith("by the operator; resume it on the console")
    store.save_checkpoint(run.state, 0.0)
    assert {"paused", "excluded"} & as_json(store).keys() == set()
    act(Action.EXCLUDE, Action.PAUSE)
    assert as_json(store).items() >= {"paused": True, "excluded": ["b"], "missing": ["a"]}.items()
    assert rows(store)["excluded"] == "1: b"
    log_operator_state(*paused_and_excluded(store))
    logged = [record.message for record in caplog.records if record.name == log_operator_state.__module__]
    assert [message.partition(";")[0] for message in logged] == [
        "the run is paused by the operator",
        "excluded by the operator: b",
    ]
    act(Action.INCLUDE, Action.RESUME)
    assert {"paused", "excluded"} & as_json(store).keys() == set()
    view = ServerView(seen=time.time(), waits="2 devices must answer and 1 can", rests="until 2026-11-27 22:00")
    Observations(store.folder).save(view, {"c": run.status("c", error="its disk is full")})
    assert rows(store).items() >= {"waits": view.waits, "rests": view.rests}.items()
    assert rows(store)["cannot take part"] == "c (its disk is full)"
    assert as_json(store)["cannot_take_part"] == {"c": "its disk is full"}


def test_the_command_returns_to_a_kept_round_or_names_those_that_are_kept(store: RunStore) -> None:
    def rollback(number: int) -> Result:
        return CliRunner().invoke(app, ["rollback", str(number), "--out", str(store.folder)])

    assert "keeps no global expert yet" in str(rollback(1).exception)
    for number in (3, 4):
        KeptExperts(store.folder).write(number, np.zeros(3, np.float32))
    assert "round 5 is not kept; those of these rounds are: 3, 4" in str(rollback(5).exception)
    assert rows(store)["rollback to"] == "round 3, 4"
    assert "when its server is started again" in rollback(3).stdout
    ((_, operation),) = Operations(store.folder).waiting()
    assert operation is not None and (operation.action, operation.round) == (Action.ROLLBACK, 3)
    store.commit([], ended="too few updates")
    assert "has failed (too few updates)" in str(rollback(3).exception)


def test_the_command_lists_what_devices_propose_and_adds_classes(run: CoordinatorRun, store: RunStore) -> None:
    def classes(*options: str) -> Result:
        return CliRunner().invoke(app, ["classes", "--out", str(store.folder), *options])

    assert "no device proposes another class" in classes().stdout
    assert rows(store)["classes"] == f"{len(CLASSES)}, version 1"
    proposed = {"a": {"quince": 5, "apple": 2}, "b": {"quince": 3, "fig [x]": 1}}
    run.online("a", "b")
    store.save_checkpoint(run.state, 0.0)
    statuses = {name: run.status(name, proposed=counts) for name, counts in proposed.items()}
    Observations(store.folder).save(ServerView(seen=time.time(), adds=("pear",)), statuses)
    assert [line.split() for line in classes().stdout.splitlines()[-2:]] == [
        ["quince", "2", "8", "a,", "b"],
        ["fig", "[x]", "1", "1", "b"],
    ]
    assert json.loads(classes("--json").stdout)["proposed"][1] == {"name": "fig [x]", "devices": ["b"], "samples": 1}
    shown = rows(store)
    assert shown["proposed classes"].startswith("quince by 2 devices, fig [x] by 1 device; add them with")
    assert shown["adds"] == "1: pear"
    for wrong, text in (
        ("apple", "the run has the class 'apple' already"),
        ("Apple", "--add: the name 'Apple' differs from that of another class in case or outer spaces only"),
        ("pear", "--add: the class 'pear' is added after the present round already"),
        ("", "--add names no class"),
        ("fig,", "class '' has no letters"),
        ("fig,fig", "class 'fig' is named twice"),
        ("unknown", "'unknown' has the name that predictions use"),
        (",".join(map(str, range(MAX_ADDED + 1))), f"more than {MAX_ADDED}; add the others later"),
    ):
        assert text in str(classes("--add", wrong).exception)
    assert Operations(store.folder).waiting() == []
    added = classes("--add", "quince, fi\u0301g").stdout
    assert "warning: no device proposes f\u00edg; check the spelling, a class is never removed within a run" in added
    assert "adds quince, f\u00edg after its present round, when its server is started again" in added
    ((_, operation),) = Operations(store.folder).waiting()
    assert operation is not None and operation.classes == ("quince", "f\u00edg")
    assert "the class 'quince' is added after" in str(classes("--add", "quince").exception)
    refused = str(classes("--withdraw", "apple").exception)
    assert "apple does not wait to be added, these do: pear, quince, fíg" in refused
    assert "does not add quince, when its server is started" in classes("--withdraw", "quince,quince").stdout
    assert json.loads(classes("--json").stdout)["to_add"] == ["pear", "fíg"]
    store.commit([], ended="finished")
    assert "has ended (finished); start a new run with --from" in str(classes("--add", "lime").exception)


def test_status_names_rejected_candidates(store: RunStore) -> None:
    assert "rejected" not in rows(store)
    record = closed_round("r", 3, 4, ["a", "b"]).model_copy(update={"rejected": "the candidate of round 2 is rejected"})
    store.commit([], [closed_round("r", 2, 4, ["a", "b"]), record])
    assert rows(store)["rejected"].startswith("in round 3: the candidate of round 2 is")
    assert as_json(store)["rejected"] == {"3": "the candidate of round 2 is rejected"}


def test_status_names_devices_that_are_left_out_and_those_that_rarely_took_part(
    run: CoordinatorRun, store: RunStore
) -> None:
    run.online("a", "b")
    run.answers(["a", "b"])
    for _ in range(LEFT_OUT_AFTER):
        run.answers(["b"], tensors={})
        run.answers(["a"])
    store.commit([], [command.closed for command in run.of(StoreRound)])
    store.save_checkpoint(run.state, 0.0)
    shown, until = rows(store), run.announced.round - 1 + LEFT_OUT_ROUNDS
    assert shown["left out"] == f"b until round {until}; 3 updates in a row were refused"
    assert shown["rarely took part"] == "b 0×, of 3 training rounds"
    assert as_json(store).items() >= {"left_out": {"b": until}, "rarely_took_part": {"b": 0}}.items()


def test_status_shows_epsilon_of_each_observer(vit: Built, tmp_path: Path) -> None:
    """The update of the present round, which the server has already seen, counts for the server."""
    rule = Sal(AllAtOnce(), max_level=1)
    settings = {"privacy": PRIVACY, "aggregation": Aggregation(rule=Rule.MEAN), "min_updates": 1}
    plan = plan_for(vit, devices=2, stage1_sal=rule, stage2_sal=rule, **settings)
    run, store = CoordinatorRun(plan), open_run(tmp_path / "private", plan.config, vit.bundle)
    run.online("a", "b")
    run.answers(["a", "b"])
    store.commit([], [command.closed for command in run.of(StoreRound)])
    store.save_checkpoint(run.state, 0.0)
    once = gaussian_epsilon(1.0, 1e-5)
    assert as_json(store)["epsilon"] == dict.fromkeys(("public", "participant", "server", "colluders"), once)
    update = make_update(plan, run.announced, "a")
    (store.blobs.folder / update.sha256).write_bytes(pack(update.update, update.tensors))
    store.commit([LoggedEvent(1.0, update)])
    shown = rows(store)
    assert shown["ε for everybody"] == f"{once:.3g} at δ = 1e-05"
    assert "privacy" not in shown
    assert shown["ε for the server with one device"] == f"{gaussian_epsilon(2.0, 1e-5):.3g} at δ = 1e-05"


def test_status_says_whether_a_server_runs_in_the_folder(run: CoordinatorRun, store: RunStore) -> None:
    assert rows(store)["server"].startswith("does not run, no event yet; start it again with")
    with store.files.locked():
        assert rows(store)["server"] == f"runs as process {os.getpid()}, no event yet"
        store.commit([LoggedEvent(0.0, StatusSeen(run.status("a")))])
        assert rows(store)["server"] == f"runs as process {os.getpid()}, last event 0:00:00 ago"
    os.utime(store.folder / "lock", (0, time.time() - 90))
    assert rows(store)["server"].startswith("does not run, last event 0:01:3")
    server = as_json(store)["server"]
    assert isinstance(server, dict) and server.items() >= {"runs": False, "pid": os.getpid()}.items()
    store.commit([], ended="finished")
    assert rows(store)["server"] == "does not run, last event 0:00:00 ago"


def test_a_folder_that_may_not_be_written_to_is_read_as_it_is(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.commit([], ended="finished")
    copy = shutil.copytree(store.folder, tmp_path / "copy")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(RunError, match=r"may not write to .*run\.sqlite-wal has changes"):
        RunStore(copy)
    store.close()
    before = sorted(path.name for path in store.folder.iterdir())
    assert rows(RunStore(store.folder))["ended"] == "finished"
    assert sorted(path.name for path in store.folder.iterdir()) == before and "run.sqlite-wal" not in before


def test_at_the_end_status_shows_no_round(run: CoordinatorRun, store: RunStore) -> None:
    store.commit([], ended="finished")
    shown = rows(store)
    assert shown["ended"] == "finished"
    assert not {"round", "stage", "selected", "answered", "online"} & shown.keys()


def test_a_replay_without_closed_rounds_has_nothing_to_compare(store: RunStore) -> None:
    assert show(store, "replay") == "no closed rounds to compare yet\n"
