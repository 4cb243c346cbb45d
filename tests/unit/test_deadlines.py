"""When a round closes: deadlines that follow what was seen, devices that are not waited for, and limits that change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import Built
from support.coordinators import ABC, JOIN_SECONDS, PRIVACY, ROUND_SECONDS, CoordinatorRun, plan_for, started

from fedfmsl.common.settings import read_settings
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import Round, Stage, Verdict
from trainer_server.config import RunConfig
from trainer_server.coordinator.events import (
    AnnounceRound,
    ClockTicked,
    LimitsChanged,
    Log,
    OperatorActed,
    StatusSeen,
    StoreRound,
)
from trainer_server.coordinator.limits import MAX_STRETCH, check_change, least_updates
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.refusals import LEFT_OUT_AFTER, LEFT_OUT_ROUNDS
from trainer_server.coordinator.round_end import next_deadline
from trainer_server.service.lifecycle import change_limits, make_plan, open_run, replay_rounds, restore_state
from trainer_server.service.stored import refuse_changes, require_unchanged, stored_settings
from trainer_server.settings import ResumeSettings, ServerSettings, ServiceSettings
from trainer_server.storage.event_rows import LoggedEvent
from trainer_server.storage.run_status import limits_in_force
from trainer_server.storage.run_store import RunStore

AB, A = ["a", "b"], ["a"]


def at_deadline(run: CoordinatorRun, working: str = "") -> None:
    """The present round's deadline passes while the devices `working` are at work."""
    run.now = next_deadline(run.plan, run.state)
    run.feed_only(ClockTicked(frozenset(working)))


def seconds(run: CoordinatorRun) -> float:
    return next_deadline(run.plan, run.state) - run.state.since


def notes(run: CoordinatorRun) -> str:
    return " | ".join(note.text for note in run.of(Log))


# a round that needs longer than its deadline


def test_a_round_with_too_few_updates_lasts_longer_while_devices_are_at_work(vit: Built) -> None:
    run = started(vit)
    run.answers(A)
    at_deadline(run, "bc")
    assert (run.announced.round, seconds(run)) == (1, 2 * ROUND_SECONDS)
    assert "round 1 got 1 update, fewer than 2 after 100 s; still at work: b, c; it lasts up to 200 s now" in notes(run)
    assert "resume with a longer --round-timeout" in notes(run)
    run.answers(["b", "c"])
    assert run.verdicts == [Verdict.ACCEPTED] * 3  # nothing was computed twice
    assert run.of(StoreRound)[0].closed.updates.keys() == {*ABC} and not run.of(StoreRound)[0].closed.repeated


def test_later_rounds_keep_the_longer_time_until_one_is_quick(vit: Built) -> None:
    run = started(vit)
    at_deadline(run, "abc")
    at_deadline(run, "abc")
    run.now += ROUND_SECONDS
    run.answers(ABC)
    assert seconds(run) == 4 * ROUND_SECONDS
    for factor in (2, 1, 1):
        run.answers(ABC)
        assert seconds(run) == factor * ROUND_SECONDS


@pytest.mark.parametrize("working", ["", "a"], ids=["nobody is at work", "only one that has answered is"])
def test_a_round_that_nobody_is_working_on_is_repeated_as_before(vit: Built, working: str) -> None:
    run = started(vit)
    run.answers(A)
    at_deadline(run, working)
    assert (run.announced.round, run.announced.stage, seconds(run)) == (2, Stage.STATISTICS, ROUND_SECONDS)


def test_a_device_that_went_offline_while_at_work_is_not_at_work(vit: Built) -> None:
    run = started(vit)
    run.answers(A)
    run.feed(StatusSeen(run.status("b", online=False)), StatusSeen(run.status("c", online=False)))
    at_deadline(run, "bc")
    assert (run.announced.round, seconds(run)) == (2, ROUND_SECONDS)


def test_a_device_that_never_answers_delays_a_round_up_to_a_limit(vit: Built) -> None:
    run = started(vit)
    while run.announced.round == 1:
        at_deadline(run, "abc")
    assert run.now == MAX_STRETCH * ROUND_SECONDS
    assert seconds(run) == ROUND_SECONDS


def test_a_round_with_enough_updates_closes_at_its_deadline_and_names_who_was_still_at_work(vit: Built) -> None:
    run = started(vit)
    run.answers(AB)
    at_deadline(run, "c")
    assert run.announced.stage is Stage.GLOBAL
    assert "round 1: still at work after 100 s: c; If this repeats" in notes(run)


# rounds that no later one waits for


def test_the_baseline_and_the_evaluation_have_the_time_that_their_work_takes(vit: Built) -> None:
    run = started(vit, baseline=True, stage1_rounds=4)
    took = {Stage.STATISTICS: 80.0, Stage.GLOBAL: 70.0}
    while run.announced.stage is not Stage.BASELINE:
        assert seconds(run) == ROUND_SECONDS
        run.now += took.get(run.announced.stage, 1.0)
        run.answers(ABC)
    assert seconds(run) == 3 * 4 * 70
    run.answers(ABC)
    assert (run.announced.stage, seconds(run)) == (Stage.EVALUATE, 3 * 80)


# devices that no round waits for


def refused_update(run: CoordinatorRun, device: str) -> None:
    """The device sends an update of NaN."""
    (name, shape) = next((slot.name, slot.shape) for slot in run.plan.bundle.expert.slots)
    run.answers([device], tensors={name: np.full(shape, np.nan, np.float32)})
    assert run.verdicts[-1] is Verdict.REJECTED


def test_a_device_that_pauses_during_a_round_is_not_waited_for_any_longer(vit: Built) -> None:
    run = started(vit)
    run.answers(AB)
    run.feed(StatusSeen(run.status("c", paused="81 °C")))
    assert run.announced.stage is Stage.GLOBAL


def test_a_refused_device_is_not_waited_for_and_later_left_out(vit: Built) -> None:
    run = started(vit, stage1_rounds=LEFT_OUT_AFTER + LEFT_OUT_ROUNDS + 1)
    run.answers(ABC)
    for times in range(LEFT_OUT_AFTER):
        assert run.state.expected == {*ABC}
        refused_update(run, "c")
        refused_update(run, "c")  # several in one round count once
        run.answers(AB)
        assert run.announced.index == times + 1 and run.now == 0
    assert f"c is left out of the next {LEFT_OUT_ROUNDS} rounds: its updates were refused in 3 rounds" in notes(run)
    for _ in range(LEFT_OUT_ROUNDS):
        assert (run.announced.chosen, run.state.expected) == (("a", "b"), {"a", "b"})
        run.answers(AB)
    assert run.state.expected == {*ABC}
    refused_update(run, "c")  # once more, and it is left out again
    run.answers(AB)
    assert run.state.expected == {"a", "b"}


def test_an_accepted_update_ends_the_row_of_refused_ones(vit: Built) -> None:
    run = started(vit)
    run.answers(ABC)
    for _ in range(2):
        refused_update(run, "c")
        run.answers(AB)
    run.answers(ABC)
    assert not run.state.refused and run.state.expected == {*ABC}


def test_nobody_is_left_out_if_too_few_devices_would_remain(vit: Built) -> None:
    run = started(vit, devices=AB, min_updates=2)
    run.answers(AB)
    for _ in range(LEFT_OUT_AFTER + 1):
        assert run.state.expected == {"a", "b"}
        run.answers(A)
        refused_update(run, "b")
        at_deadline(run)


# how many updates a round needs


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({"devices": 1}, 1),
        ({"devices": 3}, 2),
        ({"devices": 6}, 3),
        ({"devices": 10, "select": "random", "fraction": 0.3}, 2),
        ({"devices": 10, "enough": 0.5}, 3),
        ({"devices": 10, "min_updates": 1}, 1),
    ],
)
def test_a_round_needs_half_of_the_updates_that_it_waits_for(vit: Built, change: dict[str, Any], least: int) -> None:
    assert least_updates(plan_for(vit, **change).config) == least


def test_a_run_that_starts_with_a_part_of_its_devices_says_so(vit: Built) -> None:
    run = CoordinatorRun(plan_for(vit))
    run.online(*AB)
    run.now = JOIN_SECONDS
    run.feed()
    assert run.announced.stage is Stage.STATISTICS
    assert "only 2 of 3 devices joined within 50 s" in notes(run)


# limits that change


@pytest.fixture
def config(vit: Built) -> RunConfig:
    return plan_for(vit, audit=True).config


def test_a_replay_closes_every_round_by_the_limits_of_its_time(vit: Built, config: RunConfig, tmp_path: Path) -> None:
    store = open_run(tmp_path / "run", config, vit.bundle)
    run = CoordinatorRun(make_plan(store, vit.bundle))

    def happens(event: Any) -> None:
        before = run.state
        commands = run.feed_only(event)
        if run.state is not before:
            store.commit(
                [LoggedEvent(run.now, event)],
                [command.closed for command in commands if isinstance(command, StoreRound)],
            )

    for name in ABC:
        happens(StatusSeen(run.status(name)))
    happens(ClockTicked())
    run.state = change_limits(store, run.plan, run.state, run.now, {"round_timeout": 2 * ROUND_SECONDS})
    assert seconds(run) == 2 * ROUND_SECONDS
    for now, busy in ((1.0, ABC), (2.0, ABC), (4.0, AB), (8.0, []), (8.5, []), (10.5, [])):
        run.now = now * ROUND_SECONDS
        happens(ClockTicked(frozenset(busy)))
    assert [announced.round for announced in announcements(run)] == [1, 2, 3]
    again, _ = restore_state(store, run.plan)
    assert (again.limits, again.stretch, again.since) == (run.state.limits, run.state.stretch, run.state.since)
    assert list(replay_rounds(store, run.plan)) == announcements(run)


def announcements(run: CoordinatorRun) -> list[Round]:
    return [command.round for command in run.of(AnnounceRound)]


def test_an_unchanged_limit_is_no_event(vit: Built, config: RunConfig, tmp_path: Path) -> None:
    store = open_run(tmp_path / "run", config, vit.bundle)
    run = CoordinatorRun(make_plan(store, vit.bundle))
    assert run.feed_only(LimitsChanged(run.state.limits)) == []
    assert change_limits(store, run.plan, run.state, 0.0, {"round_timeout": ROUND_SECONDS}) is run.state
    assert store.is_unstarted()


def test_limits_that_do_not_fit_the_run_are_refused(vit: Built) -> None:
    run = started(vit)
    with pytest.raises(ConfigError, match="--min-updates 4 is more than --devices 3"):
        check_change(run.plan.config, run.state.limits.model_copy(update={"min_updates": 4}))
    for change, option in (({"every": "24h"}, "--every 24h"), ({"min_new": 5}, "--min-new 5")):
        with pytest.raises(ConfigError, match=f"{option}: the run does not begin again"):
            check_change(run.plan.config, run.state.limits.model_copy(update=change))
    private = run.plan.config.model_copy(update={"privacy": PRIVACY})
    with pytest.raises(ConfigError, match="with --dp-noise it stays 1"):
        check_change(private, run.state.limits.model_copy(update={"min_updates": 2}))
    secure = run.plan.config.model_copy(update={"secure": True})
    with pytest.raises(ConfigError, match="with --secure a sum needs at least 3 devices"):
        check_change(secure, run.state.limits.model_copy(update={"min_updates": 2}))


def test_a_resumed_run_may_change_its_limits_and_nothing_else(config: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        'out = "o"\nbroker = "mqtt://127.0.0.1"\nround_timeout = 900\nstage1_rounds = 4\nsal = "capability-queue"\n'
    )
    settings = read_settings(ResumeSettings, file, {"enough": "0.5"}, file_model=ServerSettings)
    assert settings.changes == {"round_timeout": 900, "enough": 0.5}
    require_unchanged(config, file)
    file.write_text("learning_rate = 0.5\n")
    with pytest.raises(
        ConfigError, match=r"learning_rate = 0.5, but the run was started with 0.001, .*--round-timeout"
    ):
        require_unchanged(config, file)


def test_every_setting_of_a_run_is_compared(config: RunConfig) -> None:
    elsewhere = {"bundle", "out", "task", "classes", "classes_file"}  # bundle and task are compared by their SHA-256
    of_a_run = set(ServerSettings.model_fields) - set(ServiceSettings.model_fields) - elsewhere
    assert stored_settings(config).keys() == of_a_run


def test_start_names_the_command_that_changes_a_limit(vit: Built, config: RunConfig, tmp_path: Path) -> None:
    store = open_run(tmp_path / "run", config, vit.bundle)
    store.commit([LoggedEvent(0.0, ClockTicked())])
    with pytest.raises(ConfigError, match="resume it with python -m trainer_server resume --round-timeout 7"):
        open_run(tmp_path / "run", config.model_copy(update={"round_timeout": 7.0}), vit.bundle)
    store.commit([], ended="finished")
    with pytest.raises(ConfigError, match="it has ended, so choose another --out for a new run"):
        open_run(tmp_path / "run", config.model_copy(update={"round_timeout": 7.0}), vit.bundle)


def test_start_takes_the_limits_in_force_and_warns_of_those_that_it_ignores(
    vit: Built, config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_run(tmp_path / "run", config, vit.bundle)
    run = CoordinatorRun(make_plan(store, vit.bundle))
    deadline = OperatorActed(Operation(action=Action.DEADLINE, seconds=7.0))
    changed = LimitsChanged(run.state.limits.model_copy(update={"enough": 0.5, "round_timeout": 9.0}))
    run.feed_only(changed, deadline)
    store.commit([LoggedEvent(0.0, changed), LoggedEvent(0.0, deadline)])
    assert limits_in_force(store) == run.state.limits
    now = config.model_copy(update={"enough": 0.5, "round_timeout": 7.0})
    open_run(tmp_path / "run", now, vit.bundle)
    assert not caplog.messages
    open_run(tmp_path / "run", config, vit.bundle)  # as a service starts it again
    (text,) = caplog.messages
    assert f"--round-timeout {config.round_timeout} is ignored, 7.0 is in force" in text
    assert f"--enough {config.enough} is ignored, 0.5 is in force" in text
    with pytest.raises(ConfigError, match=r"with --enough 0\.5, not 0\.7; resume it .* resume --enough 0\.7 --out"):
        open_run(tmp_path / "run", now.model_copy(update={"enough": 0.7}), vit.bundle)
    store.commit([], ended="finished")
    refuse_changes(store, {"enough": 0.5})
    with pytest.raises(ConfigError, match=r"--enough 0\.7 cannot change: the run at .* has ended \(finished\); leave"):
        refuse_changes(store, {"enough": 0.7})


def test_participation_counts_training_rounds(vit: Built, config: RunConfig, tmp_path: Path) -> None:
    store = open_run(tmp_path / "run", config, vit.bundle)
    run = started(vit, min_updates=1)
    run.answers(ABC)
    run.answers(ABC)
    run.answers(A)
    at_deadline(run)
    store.commit([], [command.closed for command in run.of(StoreRound)])
    assert RunStore(store.folder).rounds.participation() == ({"a": 2, "b": 1, "c": 1}, 2)
