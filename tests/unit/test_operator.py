"""What an operator does to a run: every action takes effect once, is in the log, and is repeated by a replay."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from support.bundles import Built
from support.coordinators import JOIN_SECONDS, ROUND_SECONDS, CoordinatorRun, plan_for, started

from fedfmsl.protocol.messages import Stage, Verdict
from trainer_server.coordinator.events import ClockTicked, CountRefusal, Log, OperatorActed, RestChanged, StoreRound
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.round_end import next_deadline
from trainer_server.storage.checkpoint import Checkpoint, vectors_of
from trainer_server.storage.operations import MOST, Operations


def act(run: CoordinatorRun, action: Action, **fields: object) -> str:
    """What the log says of the action."""
    run.feed_only(OperatorActed(Operation.model_validate({"action": action, "by": "::1", **fields})))
    line: str = run.of(Log)[-1].text
    assert line.startswith("operator at ::1: ")
    return line.removeprefix("operator at ::1: ")


def test_a_paused_run_opens_and_closes_no_round_and_keeps_its_time(vit: Built) -> None:
    run = started(vit)
    run.now += 10
    left = next_deadline(run.plan, run.state) - run.now
    assert "the run is paused" in act(run, Action.PAUSE)
    assert act(run, Action.PAUSE) == "the run is already paused"
    run.now += 10 * ROUND_SECONDS
    run.answers("abc")
    assert act(run, Action.CLOSE, round=1) == "round 1 closes when the run is resumed"
    run.feed(ClockTicked())
    assert run.verdicts == [Verdict.ACCEPTED] * 3
    assert (run.announced.round, run.of(StoreRound)) == (1, [])
    assert act(run, Action.RESUME) == "the run is resumed"
    assert act(run, Action.RESUME) == "the run is not paused"
    assert next_deadline(run.plan, run.state) - run.now == left
    run.feed(ClockTicked())
    assert run.announced.round == 2
    assert run.of(StoreRound)[0].closed.seconds == 10
    assert list(run.state.slowest.values()) == [10]  # later deadlines follow from it


def test_a_round_closes_at_once_with_the_updates_that_it_has(vit: Built) -> None:
    run = started(vit, min_updates=2)
    run.answers("ab")
    assert act(run, Action.CLOSE, round=1) == "round 1 closes now"
    run.feed(ClockTicked(frozenset("c")))  # it does not wait for a device at work
    assert run.announced.round == 2
    closed = run.of(StoreRound)[0].closed
    assert (set(closed.updates), closed.missing, closed.repeated) == ({"a", "b"}, ("c",), "")
    assert act(run, Action.CLOSE, round=1) == "round 1 is not open, so it cannot be closed"
    run.answers("a")
    act(run, Action.CLOSE, round=2)
    run.feed(ClockTicked())
    assert "fewer than 2" in run.of(StoreRound)[1].closed.repeated


def test_an_excluded_device_counts_in_no_round_until_it_is_included(vit: Built) -> None:
    run = started(vit, min_updates=1)
    run.answers("a")
    assert "a is excluded" in act(run, Action.EXCLUDE, device="a")
    assert act(run, Action.EXCLUDE, device="a") == "a is already excluded"
    assert "has not announced itself" in act(run, Action.EXCLUDE, device="x")
    run.answers("bc")
    assert run.announced.round == 2  # the round did not wait for it
    assert set(run.of(StoreRound)[0].closed.updates) == {"b", "c"}
    assert run.announced.chosen == ("b", "c")
    run.answers("a")
    assert run.of(CountRefusal)[-1].kind == "excluded"
    assert act(run, Action.INCLUDE, device="x") == "x is not excluded"
    assert "takes part again" in act(run, Action.INCLUDE, device="a")
    run.answers("bc")
    run.answers("abc")
    assert set(run.of(StoreRound)[2].closed.updates) == {"a", "b", "c"}


def test_a_round_with_secure_sums_goes_on_without_an_excluded_device(vit: Built) -> None:
    run = started(vit, list("abcd"), secure_sums=True)
    assert run.announced.stage is Stage.KEYS
    act(run, Action.EXCLUDE, device="a")
    assert run.state.expected == run.state.awaited == frozenset("bcd")


def test_the_deadline_changes_in_the_present_round(vit: Built) -> None:
    run = started(vit)
    assert "is 500 s from now on, it was 100 s" in act(run, Action.DEADLINE, seconds=500)
    assert next_deadline(run.plan, run.state) == run.state.since + 500
    assert act(run, Action.DEADLINE, seconds=0) == "the round deadline stays 500 s"


def test_a_checkpoint_keeps_what_the_operator_has_done(vit: Built) -> None:
    run = started(vit)
    act(run, Action.EXCLUDE, device="b")
    act(run, Action.CLOSE, round=1)
    act(run, Action.PAUSE)
    restored = Checkpoint.of(run.state).state(vectors_of(run.state))
    names = ("paused_at", "closing", "excluded")
    assert [getattr(restored, name) for name in names] == [getattr(run.state, name) for name in names]


def test_a_run_that_rests_keeps_its_time_also_beside_a_pause(vit: Built) -> None:
    """Seconds in which a run is paused and rests count once, whichever begins and ends first."""
    orders = ([(Action.PAUSE, True), (True, Action.PAUSE)], [(Action.RESUME, False), (False, Action.RESUME)])
    for begins, ends in itertools.product(*orders):
        run = started(vit)
        run.now += 10
        left = next_deadline(run.plan, run.state) - run.now
        for change in (*begins, *ends):
            assert isinstance(change, bool) or act(run, change)
            if isinstance(change, bool):
                run.feed_only(RestChanged(change))
            run.now += ROUND_SECONDS
            if change in begins:
                assert next_deadline(run.plan, run.state) == math.inf
        run.now -= ROUND_SECONDS  # since the end
        assert next_deadline(run.plan, run.state) - run.now == left


def test_while_a_run_rests_updates_count_and_no_round_opens_or_closes(vit: Built) -> None:
    run = started(vit)
    run.feed_only(RestChanged(True), RestChanged(True))
    assert act(run, Action.CLOSE, round=1) == "round 1 closes when the run rests no more"
    run.answers("abc")
    assert run.verdicts == [Verdict.ACCEPTED] * 3
    assert Checkpoint.of(run.state).state(vectors_of(run.state)).rests_at == run.now
    assert "it rests outside of the hours of --schedule" in (act(run, Action.PAUSE) and act(run, Action.RESUME))
    assert (run.announced.round, run.of(StoreRound)) == (1, [])
    run.feed(RestChanged(False))
    assert run.announced.round == 2


def test_a_run_that_rests_waits_for_devices_without_end(vit: Built) -> None:
    run = CoordinatorRun(plan_for(vit))
    run.feed_only(RestChanged(True))
    run.now += 10 * JOIN_SECONDS
    run.online("a", "b", "c")
    assert run.state.announced is None
    run.feed(RestChanged(False))
    assert run.announced.round == 1


def test_actions_wait_in_order_and_a_file_that_holds_none_is_found(tmp_path: Path) -> None:
    operations = Operations(tmp_path)
    assert operations.waiting() == []
    given = [Operation(action=Action.CLOSE, round=n) for n in (3, 1, 2)]
    assert all(operations.add(each) for each in given)
    assert [operation for _, operation in operations.waiting()] == given
    (tmp_path / "operations" / "9.json").write_text('{"action": "shutdown"}')
    assert operations.waiting()[-1][1] is None
    for _ in range(MOST - 4):
        operations.add(given[0])
    assert not operations.add(given[0])


@pytest.mark.parametrize("fields", [{"seconds": float("inf")}, {"device": "../x"}, {"seconds": -1}, {"more": 1}])
def test_an_action_has_bounds(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        Operation.model_validate({"action": "exclude", **fields})
