"""A class that is added to a run in progress: the next session of the run begins with it, in the same folder."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from support.bundles import LAYERS, Built, with_names
from support.coordinators import ABC, MEAN, PRIVACY, CoordinatorRun, plan_for, started
from support.offline_server import OfflineServer
from support.samples import CLASSES

from fedfmsl.algorithms.accounting import epsilons
from fedfmsl.algorithms.sal import AllAtOnce, Sal
from fedfmsl.common import files
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.protocol.class_names import MAX_CLASSES
from fedfmsl.protocol.messages import Stage
from trainer_server.coordinator.events import BeginSession, ClockTicked, Log, OperatorActed, StatusSeen, Stop
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.privacy_budget import NoisedRounds, privacy_budget
from trainer_server.coordinator.round_end import next_deadline
from trainer_server.coordinator.sessions import approved
from trainer_server.inspect import replay
from trainer_server.service.lifecycle import make_plan, open_bundle, open_run, replay_rounds
from trainer_server.service.next_session import begin_session
from trainer_server.service.start_from import read_start
from trainer_server.storage import run_store
from trainer_server.storage.checkpoint import Checkpoint
from trainer_server.storage.database import open_database
from trainer_server.storage.kept_experts import KeptExperts
from trainer_server.storage.run_store import DATABASE, RunStore

NEW = ("quince",)
ADD = OperatorActed(Operation(action=Action.CLASSES, classes=NEW))


def opened(built: Built, folder: Path, source: Path | None = None, **config: Any) -> OfflineServer:
    settings = plan_for(built, **{"stage2_rounds": 1, "audit": True, **config}).config
    store = open_run(folder, settings, built.bundle, source)
    server = OfflineServer(store, make_plan(store, built.bundle))
    for event in server.joins():
        server.feed(event)
    return server


def until(server: OfflineServer, stage: Stage, index: int = 0) -> OfflineServer:
    """Until this round is open."""
    while server.state.announced is None or (server.state.announced.stage, server.state.announced.index) != (
        stage,
        index,
    ):
        for event in list(server.answers()):
            server.feed(event)
    return server


def finished(server: OfflineServer) -> OfflineServer:
    while server.store.ended is None:
        if server.state.announced is None:
            server.feed(ClockTicked())
        for event in list(server.answers()):
            server.feed(event)
    return server


def changed(server: OfflineServer) -> OfflineServer:
    """The class is added, and the present round is closed."""
    server.feed(ADD)
    session = server.plan.session
    for event in list(server.answers()):
        server.feed(event)
        if server.plan.session != session:
            return server
    raise AssertionError("the next session has not begun")


@pytest.mark.parametrize(
    ("stage", "index", "rounds"),
    [
        (Stage.STATISTICS, 0, 6),
        (Stage.GLOBAL, 1, 4),
        (Stage.GLOBAL, 4, 3),
        (Stage.HEAD, 0, 3),
        (Stage.PERSONAL, 0, 3),
        (Stage.EVALUATE, 0, 3),
    ],
)
def test_the_next_session_has_the_rest_of_stage_1_and_the_whole_of_stage_2(
    vit: Built, stage: Stage, index: int, rounds: int
) -> None:
    run = started(vit, stage1_rounds=6, stage2_rounds=2)
    while (run.announced.stage, run.announced.index) != (stage, index):
        run.answers(ABC)
    closed = run.announced.round
    run.feed(ADD)
    assert run.of(Log)[-1].text == f"operator: 1 class is added after round {closed}: quince"
    assert not run.of(BeginSession)
    run.answers(ABC)
    assert run.of(BeginSession) == [BeginSession(NEW, rounds)]
    assert (run.state.round, run.announced.round, run.of(Stop)) == (closed, closed, [])


def test_a_session_does_not_end_within_a_secure_aggregation(vit: Built) -> None:
    run = started(vit, secure=True, secure_sums=True, aggregation=MEAN)
    assert run.announced.stage is Stage.KEYS
    run.feed(ADD)
    run.answers("ab")
    run.now = next_deadline(run.plan, run.state)
    run.feed()  # too few keys, so the aggregation begins again: with the class
    assert run.of(BeginSession)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("quince", "apple"), "the run has the class 'apple' already"),
        (("quince", "quince"), "the class 'quince' is named twice"),
        ((" Apple",), "differs from that of another class in case or outer spaces only; did you mean 'apple'?"),
        (("quince", "Quince"), "did you mean 'quince'?"),
        ((), "no class is named"),
    ],
)
def test_names_that_cannot_be_added_change_nothing(vit: Built, names: tuple[str, ...], text: str) -> None:
    run = started(vit)
    before = run.state
    run.feed_only(OperatorActed(Operation(action=Action.CLASSES, classes=names)))
    assert text in run.of(Log)[-1].text and run.of(Log)[-1].warning
    assert run.state is before


def test_a_class_is_withdrawn_until_it_is_added(vit: Built) -> None:
    run = started(vit, approve_classes="min-devices=1")
    proposes = run.status("a", proposed={"lime": 5, "fig": 3})
    run.feed_only(ADD, OperatorActed(Operation(action=Action.CLASSES, classes=("fig",))), StatusSeen(proposes))
    run.feed_only(OperatorActed(Operation(action=Action.WITHDRAW, classes=NEW)))
    assert approved(run.plan, run.state) == ("fig", "lime")
    adds = "--approve-classes adds it"  # fig again, if only the operator took it back
    for name, why in (("quince", "does not wait to be added"), ("lime", adds), ("fig", adds)):
        before = run.state
        run.feed_only(OperatorActed(Operation(action=Action.WITHDRAW, classes=(name,))))
        assert run.state is before and why in run.of(Log)[-1].text


def test_the_rule_adds_what_enough_devices_propose(vit: Built) -> None:
    run = started(vit, approve_classes="min-devices=2", max_repeats=0, min_updates=3)
    proposed = {"a": {"quince": 5, "fig": 1}, "b": {"quince": 3}, "c": {"fig": 9}, "d": {"pear": 2}}
    run.feed(OperatorActed(Operation(action=Action.EXCLUDE, device="c")))
    run.feed_only(*(StatusSeen(run.status(name, proposed=counts)) for name, counts in proposed.items()))
    assert approved(run.plan, run.state) == NEW
    run.feed_only(ADD)  # the operator adds it as well
    assert approved(run.plan, run.state) == NEW
    run.feed_only(StatusSeen(run.status("d", proposed={"Quince": 2})), StatusSeen(run.status("b", online=False)))
    assert run.state.devices["b"].proposed == proposed["b"]  # a last will has no proposals
    run.feed_only(StatusSeen(run.status("a", proposed={**proposed["a"], "Quince": 9})))
    assert approved(run.plan, run.state) == NEW
    run.feed_only(StatusSeen(run.status("b")))
    assert run.state.devices["b"].proposed == {}
    run.feed_only(*(StatusSeen(run.status(name, proposed=counts)) for name, counts in proposed.items()))
    run.answers(ABC)
    run.now = next_deadline(run.plan, run.state)
    run.feed()
    assert run.of(Stop)[0].error and not run.of(BeginSession)  # a run that fails ends
    run.state = replace(run.state, excluded=frozenset())
    assert approved(run.plan, run.state) == ("quince", "fig")
    with pytest.raises(ValidationError, match="is not like min-devices=2"):
        plan_for(vit, approve_classes="2")


def test_a_run_has_no_more_classes_than_messages_allow(vit: Built) -> None:
    names = [f"class-{number}" for number in range(MAX_CLASSES)]
    run = CoordinatorRun(plan_for(with_names(vit, names)))
    run.feed_only(ADD)
    assert f"4097 classes are more than {MAX_CLASSES}" in run.of(Log)[-1].text


def test_a_class_is_added_in_the_same_folder(vit: Built, tmp_path: Path) -> None:
    """Rounds, records and the rows of the other classes go on, and the new class starts from class means."""
    server = until(opened(vit, tmp_path / "run"), Stage.GLOBAL, 1)
    first, former = server.plan, server.state.good
    server = changed(server)
    store, plan = server.store, server.plan
    assert plan.bundle.classes == (*CLASSES, *NEW)
    assert (plan.bundle.task.version, plan.session == first.session) == (2, False)
    assert (server.state.round, server.state.announced, len(store.rounds.all())) == (3, None, 3)
    assert former.round == 1 and server.state.good.expert.size == 0
    kept = server.state.expert
    server.feed(ClockTicked())  # it does not wait for devices that are online
    assert server.state.announced is not None
    assert (server.state.announced.round, server.state.announced.stage) == (4, Stage.STATISTICS)
    for event in list(server.answers()):
        server.feed(event)
    heads = [plan.bundle.expert.split(expert)["classifier.weight"] for expert in (kept, server.state.expert)]
    assert np.array_equal(heads[0][: len(CLASSES)], heads[1][: len(CLASSES)])
    assert not np.allclose(heads[0][-1], heads[1][-1], atol=1e-3)
    numbers = [closed.round.round for closed in finished(server).store.rounds.all()]
    assert numbers == list(range(1, len(numbers) + 1))
    stages = [closed.round.stage for closed in server.store.rounds.all()][3:]
    assert stages == [Stage.STATISTICS, *3 * [Stage.GLOBAL], Stage.HEAD, Stage.PERSONAL, Stage.EVALUATE]
    tasks = {path.name for path in (store.folder / "tasks").iterdir()}
    assert tasks == {each.bundle.task.sha256 for each in (first, plan)}
    again = list(replay_rounds(store, make_plan(store, plan.bundle)))
    assert again[:-1] == [closed.round for closed in store.rounds.all()][3:]
    replay(store.folder)
    with closing(sqlite3.connect(store.folder / DATABASE)) as db, db:
        db.execute(
            "DELETE FROM events WHERE seq IN (SELECT seq FROM events WHERE kind = 'tick' ORDER BY 1 DESC LIMIT 2)"
        )
    with pytest.raises(RunError, match=f"round {numbers[-1]} has a record, but does not follow from the event log"):
        replay(store.folder)


def test_a_class_that_is_added_before_the_first_round_needs_no_global_expert(vit: Built, tmp_path: Path) -> None:
    store = open_run(tmp_path / "run", plan_for(vit, stage1_rounds=2, stage2_rounds=1).config, vit.bundle)
    server = OfflineServer(store, make_plan(store, vit.bundle))
    server.feed(ADD)
    server.feed(ClockTicked())
    assert (server.plan.bundle.classes, server.plan.warm, server.state.round) == ((*CLASSES, *NEW), None, 0)
    for event in server.joins():
        server.feed(event)
    assert finished(server).store.ended == "finished"
    assert len(store.rounds.all()) == 1 + 3 + 1 + 1 + 1


@pytest.mark.parametrize("prepares", [True, False])
def test_the_first_round_with_a_class_waits_for_the_devices_that_have_it(
    vit: Built, tmp_path: Path, prepares: bool
) -> None:
    server = until(opened(vit, tmp_path / "run", min_updates=1), Stage.GLOBAL)
    holder = CoordinatorRun(server.plan).status("c")
    server.feed(StatusSeen(holder.model_copy(update={"proposed": {"quince": 4}})))
    server = changed(server)
    server.feed(ClockTicked())
    assert server.state.announced is None
    if prepares:
        server.feed(StatusSeen(holder))
    else:
        server.now = next_deadline(server.plan, server.state)
    server.feed(ClockTicked())
    assert server.state.announced is not None and server.state.announced.asks("c")


def test_what_the_operator_has_set_goes_on(vit: Built, tmp_path: Path) -> None:
    server = until(opened(vit, tmp_path / "run", min_updates=1), Stage.GLOBAL)
    server.feed(OperatorActed(Operation(action=Action.EXCLUDE, device="c")))
    server.feed(OperatorActed(Operation(action=Action.DEADLINE, seconds=7)))
    server = changed(server)
    assert (server.state.excluded, server.state.limits.round_timeout) == (frozenset("c"), 7)
    server.feed(ClockTicked())
    assert server.state.announced is not None and server.state.announced.chosen == ("a", "b")


def test_the_run_returns_to_a_global_expert_of_fewer_classes(vit: Built, tmp_path: Path) -> None:
    server = until(opened(vit, tmp_path / "run"), Stage.GLOBAL, 1)
    earlier, made = server.state.expert, server.state.made
    KeptExperts(server.store.folder).write(made, earlier)
    server = until(changed(server), Stage.GLOBAL, 1)
    for announced in (True, False):  # between two sessions it takes effect as well
        if not announced:
            server.feed(OperatorActed(Operation(action=Action.CLASSES, classes=("plum-2",))))
            before = server.plan.session
            while server.plan.session == before:
                for event in list(server.answers()):
                    server.feed(event)
                    if server.plan.session != before:
                        break
        sha256 = KeptExperts(server.store.folder).copy(made, server.store.blobs.folder)
        server.feed(OperatorActed(Operation(action=Action.ROLLBACK, round=made, sha256=sha256)))
        server.feed(ClockTicked())
        layout = server.plan.bundle.expert
        assert (server.state.made, server.state.expert.size) == (made, layout.total)
        weights = layout.split(server.state.expert)["classifier.weight"]
        assert np.array_equal(weights[: len(CLASSES)], vit.bundle.expert.split(earlier)["classifier.weight"])
        assert weights[len(CLASSES) :].any(axis=1).all()
        assert np.array_equal(server.state.expert[layout.size(0) :], earlier[vit.bundle.expert.size(0) :])
    start = server.state.expert[: server.plan.bundle.expert.size(server.state.sal.level)]
    assert np.array_equal(server.state.start, start)  # of the session that has not begun
    server.feed(ClockTicked())
    assert finished(server).store.ended == "finished"


NOISY = {
    "privacy": PRIVACY,
    "aggregation": MEAN,
    "stage1_sal": Sal(AllAtOnce(), LAYERS),
    "stage2_sal": Sal(AllAtOnce(), LAYERS),
}


def test_the_privacy_budget_counts_each_round_once(vit: Built, tmp_path: Path) -> None:
    server = finished(changed(until(opened(vit, tmp_path / "run", **NOISY), Stage.GLOBAL, 1)))
    store = server.store
    noised = 3 + 1 + 3 + 1  # statistics and two rounds of stage 1; statistics, stage 1 and stage 2
    closed = NoisedRounds.of(store.rounds.counts(), store.origin.spent_before)
    budget = privacy_budget(store.origin.config, closed, server.state.announced, is_answered=False)
    expected = {observer.value: value for observer, value in epsilons(PRIVACY, noised, 1e-5).items()}
    assert budget == pytest.approx(expected, rel=1e-6)
    bundle = open_bundle(store)
    later = read_start(store.folder, bundle, store.origin.config).origin.mu_squared
    assert later is not None and closed.before == {}
    again = NoisedRounds(before=later)
    assert privacy_budget(store.origin.config, again, None, is_answered=False) == pytest.approx(expected, rel=1e-6)


def test_the_command_that_started_the_run_resumes_its_present_session(vit: Built, tmp_path: Path) -> None:
    earlier = finished(opened(vit, tmp_path / "earlier", stage1_rounds=1)).store
    store = changed(until(opened(vit, tmp_path / "run", earlier.folder), Stage.GLOBAL, 1)).store
    config, session = store.origin.config, store.origin.session
    for bundle in (vit.bundle, open_bundle(store)):
        again = open_run(store.folder, config, bundle, earlier.folder)
        assert (again.origin.session, again.task().classes) == (session, (*CLASSES, *NEW))
    assert again.origin.start is not None
    assert again.origin.start.text == f"its session before, after round 2, at level 2; new: {NEW[0]}"
    with pytest.raises(ConfigError, match=f"which goes on from {earlier.folder}; give the same --from"):
        open_run(store.folder, config, vit.bundle)


def copied_before_each_step(
    folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[RunStore], None]
) -> list[Path]:
    """What a server leaves behind that is killed in `work` at each step: a statement of the database, or the renaming
    or removal of a file. The last copy is that of the end."""
    copied: list[Path] = []

    def copy(*_: object) -> None:
        copied.append(Path(shutil.copytree(folder, copies / str(len(copied)))))

    def traced(path: Path, busy_seconds: float) -> sqlite3.Connection:
        database = open_database(path, busy_seconds)
        database.set_trace_callback(copy)
        return database

    with monkeypatch.context() as patch:
        patch.setattr(run_store, "open_database", traced)
        originals: dict[str, Callable[..., object]] = {"replace": Path.replace, "unlink": Path.unlink}
        for name in originals:

            def step(*arguments: object, name: str = name, **named: object) -> object:
                copy()
                return originals[name](*arguments, **named)

            patch.setattr(Path, name, step)
        store = RunStore(folder)
        work(store)
        store.close()
    copy()
    return copied


def test_a_server_killed_at_any_step_begins_the_next_session_exactly_once(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards it has begun or has not, and then begins with the same state."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)  # power failures are not tested here
    server = until(opened(vit, tmp_path / "run"), Stage.GLOBAL, 1)
    server.feed(ADD)

    def begin(store: RunStore, server: OfflineServer = server) -> None:
        begin_session(store, server.plan, server.state, BeginSession(NEW, 3), server.now)

    working = Path(shutil.copytree(server.store.folder, tmp_path / "working"))
    undone, done, ends = 0, 0, set()
    for folder in copied_before_each_step(working, tmp_path / "killed", monkeypatch, begin):
        store = RunStore(folder)
        if store.origin.session == server.plan.session:
            undone += 1
            again = OfflineServer(store, make_plan(store, open_bundle(store)))
            assert Checkpoint.of(again.state) == Checkpoint.of(server.state)
            begin(store, again)
        else:
            done += 1
        found = OfflineServer(store, make_plan(store, open_bundle(store)))
        assert found.plan.bundle.task.version == 2
        assert [closed.round.round for closed in store.rounds.all()] == [1, 2]
        ends.add((Checkpoint.of(found.state).model_dump_json(), found.state.expert.tobytes()))
        store.close()
    assert len(ends) == 1 and undone > 8 and done > 2
