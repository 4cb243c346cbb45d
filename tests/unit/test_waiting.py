"""A run that too few devices can go on with waits for them, says for whom and why, and a replay waits as it did."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from support.bundles import Built
from support.coordinators import MEAN, ROUND_SECONDS, CoordinatorRun, make_update, started

from trainer_server.coordinator.advance import advance
from trainer_server.coordinator.events import (
    ClockTicked,
    Command,
    Event,
    LimitsChanged,
    Log,
    OperatorActed,
    StatusSeen,
    Stop,
    StoreRound,
)
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.round_end import next_deadline
from trainer_server.coordinator.state import initial_state
from trainer_server.coordinator.waiting import WAITS_AFTER, remedy
from trainer_server.storage.checkpoint import Checkpoint, vectors_of

BUDGET = "its --max-epsilon 4 would be passed: ε 5 after this round"


@dataclass
class LoggedRun(CoordinatorRun):
    """Keeps the events, as the server's log does."""

    log: list[tuple[Event, float]] = field(default_factory=list)

    def feed_only(self, *events: Event) -> list[Command]:
        self.log += [(event, self.now) for event in events]
        return super().feed_only(*events)


def lost(run: CoordinatorRun, **change: object) -> None:
    """Two of three devices cannot answer from now on, and the deadlines of WAITS_AFTER rounds pass."""
    run.feed(StatusSeen(run.status("b", **change)))
    run.feed(OperatorActed(Operation(action=Action.EXCLUDE, device="c")))
    for _ in range(WAITS_AFTER):
        pass_deadline(run)


def pass_deadline(run: CoordinatorRun) -> None:
    run.now += ROUND_SECONDS
    run.feed()


@pytest.mark.parametrize(
    ("change", "why"),
    [({"paused": BUDGET}, f"paused: {BUDGET}"), ({"online": False}, "offline"), ({"error": "x"}, "x")],
)
def test_a_run_that_too_few_devices_can_go_on_with_waits_and_names_them(
    vit: Built, change: dict[str, object], why: str
) -> None:
    run = started(vit, min_updates=2)
    lost(run, **change)
    texts = [command.text for command in run.of(Log) if command.warning]
    missing = f"2 devices must answer and 1 can. Missing: b ({why}), c (excluded by the operator)"
    assert texts[0] == f"round 1 got 0 updates, fewer than 2; repeating it; without an answer: a; {missing}"
    assert f"the run waits: {missing}. It goes on by itself" in texts[-1]
    number = run.announced.round
    assert (run.state.waiting, number) == (True, 1 + WAITS_AFTER)
    run.now += 1e6
    run.answers("a")
    assert (run.announced.round, next_deadline(run.plan, run.state)) == (number, float("inf"))
    assert not run.state.slowest  # the wait lengthens no later deadline
    assert Checkpoint.of(run.state).state(vectors_of(run.state)).waiting


@pytest.mark.parametrize(
    ("config", "offered"),
    [({"min_updates": 2}, True), ({"min_updates": 1}, False), ({"secure": True, "aggregation": MEAN}, False)],
)
def test_a_lower_min_updates_is_offered_only_if_the_run_can_have_it(
    vit: Built, config: dict[str, object], offered: bool
) -> None:
    run = started(vit, **config)
    assert ("a lower --min-updates" in remedy(run.plan, run.state)) is offered


def test_it_goes_on_in_the_same_round_when_enough_devices_can_answer(vit: Built) -> None:
    run = started(vit, min_updates=2)
    run.online("b", "c", online=False)
    for _ in range(WAITS_AFTER):
        pass_deadline(run)
    run.online("a")
    run.now += 1e6
    run.answers("a")
    number = run.announced.round
    run.online("b")
    assert "goes on: 2 devices can answer now" in run.of(Log)[-1].text
    assert (run.announced.round, next_deadline(run.plan, run.state)) == (number, run.now + ROUND_SECONDS)
    run.answers("b")
    assert run.announced.round == number + 1
    assert set(run.of(StoreRound)[-1].closed.updates) == {"a", "b"}
    assert run.of(StoreRound)[-1].closed.seconds == 0  # without the wait


def test_a_round_that_does_not_ask_the_devices_that_can_answer_is_announced_anew(vit: Built) -> None:
    run = started(vit, min_updates=2)
    lost(run, online=False)
    waited = run.announced
    assert waited.chosen == ("a",)
    run.feed(OperatorActed(Operation(action=Action.INCLUDE, device="c")))
    assert (run.announced.round, run.announced.index, run.state.waiting) == (waited.round + 1, waited.index, False)
    run.answers("ac")
    assert run.announced.round == waited.round + 2


def test_with_max_repeats_such_a_run_ends(vit: Built) -> None:
    run = started(vit, min_updates=2, max_repeats=WAITS_AFTER + 1)
    run.online("b", "c", online=False)
    for _ in range(WAITS_AFTER + 2):
        pass_deadline(run)
    assert "times in a row; the run ends" in run.of(Stop)[0].error


def test_a_run_that_waits_ends_once_it_is_resumed_with_max_repeats(vit: Built) -> None:
    run = started(vit, min_updates=2)
    lost(run, online=False)
    run.now += 1e6
    run.feed(LimitsChanged(run.state.limits.model_copy(update={"max_repeats": WAITS_AFTER})))
    assert not run.of(Stop)  # a device that has come back meanwhile can answer
    pass_deadline(run)
    assert "times in a row; the run ends" in run.of(Stop)[0].error


def test_devices_that_can_answer_and_do_not_make_no_run_wait(vit: Built) -> None:
    run = started(vit, min_updates=2)
    for _ in range(WAITS_AFTER + 2):
        pass_deadline(run)
    assert not run.state.waiting and run.announced.round == WAITS_AFTER + 3
    assert "without an answer: a, b, c" in run.of(Log)[-1].text


def test_a_replay_waits_as_long(vit: Built) -> None:
    run = LoggedRun(started(vit, min_updates=2).plan)
    run.online(*"abc")
    lost(run, online=False)
    run.now += 1e6
    run.feed(OperatorActed(Operation(action=Action.INCLUDE, device="c")))
    run.feed(*(make_update(run.plan, run.announced, name) for name in "ac"))
    state = initial_state(run.plan, 0.0)
    for event, at in run.log:
        before = state
        state, commands = advance(run.plan, state, event, at)
        assert commands or not isinstance(event, ClockTicked) or state is before  # the log has no other ticks
    assert (state.round, state.announced) == (run.state.round, run.state.announced)
