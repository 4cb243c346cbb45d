"""A global expert that too many devices lose with is not adopted, and the operator can return to an earlier one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load
from support.bundles import Built
from support.coordinators import (
    ABC,
    MEAN,
    PRIVACY,
    ROUND_SECONDS,
    RULE,
    TENSORS,
    CoordinatorRun,
    make_update,
    plan_for,
    started,
)
from support.secure_devices import SecureRun, secure_devices

from fedfmsl.algorithms.sal import FixedSchedule
from fedfmsl.protocol.messages import Stage, Sums
from fedfmsl.protocol.tensors import blob_hash
from trainer_server.config import Head
from trainer_server.coordinator.adoption import asked
from trainer_server.coordinator.candidates import likelihoods, votes_to_reject, why_rejected
from trainer_server.coordinator.events import AnnounceRound, Command, Log, OperatorActed, Stop, StoreRound
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.coordinator.records import ClosedRound
from trainer_server.coordinator.rollback import restart_position
from trainer_server.coordinator.secure_sums import MAX_REPEATS
from trainer_server.storage.checkpoint import Checkpoint, vectors_of
from trainer_server.storage.kept_experts import KEPT, KeptExperts

ABCDE = list("abcde")
Losses = Mapping[str, float]


def is_rejected(losses: list[float], max_regressed: float = 0.5, max_loss: float = 0.25) -> bool:
    names = [f"d{number}" for number in range(len(losses))]
    before = dict.fromkeys(names, 1.0)
    after = {name: 1.0 + loss for name, loss in zip(names, losses, strict=True)}
    return bool(why_rejected(before, after, max_loss, max_regressed))


@pytest.mark.parametrize(
    ("losses", "max_regressed", "rejected"),
    [
        ([1, 1, 0], 0.5, True),
        ([1, 0, 0], 0.5, False),
        ([1, 1, 0, 0], 0.5, False),  # not more than the share
        ([1, 1, 1, 0], 0.5, True),
        ([0.25] * 5, 0.5, False),  # not more than the loss
        ([0.26] * 5, 0.5, True),
        ([-1] * 5, 0.5, False),
        ([1, 0, 0, 0, 0], 0.05, False),  # one device alone rejects nothing,
        ([1, 1, 0, 0, 0], 0.05, True),
        ([1, 1, 1, 1, 0], 0.95, True),  # and keeps nothing
        ([1, 1, 1, 0, 0], 0.95, False),
        ([1, 1], 0.5, False),  # too few
        ([], 0.5, False),
        ([math.inf, math.inf, 0], 0.5, True),
        ([1] * 5, 1.0, False),  # never
    ],
)
def test_a_candidate_is_rejected_if_more_than_a_share_loses(
    losses: list[float], max_regressed: float, rejected: bool
) -> None:
    assert is_rejected(losses, max_regressed) is rejected


def test_it_takes_two_false_reports_to_reject_or_to_keep_a_candidate() -> None:
    for reports in range(3, 30):
        for share in np.linspace(0.01, 0.99, 33).tolist():
            assert 2 <= votes_to_reject(reports, share) <= reports - 1


def test_only_devices_that_have_measured_both_count() -> None:
    before = {"a": 1.0, "b": 1.0, "gone": 1.0}
    assert not why_rejected(before, {"a": 9.0, "b": 9.0, "new": 9.0}, 0.2, 0.5)
    assert why_rejected(before, {"a": 9.0, "b": 9.0, "gone": 9.0}, 0.2, 0.5).startswith("3 of 3 devices lose more")


def test_a_device_without_a_likelihood_has_lost_and_a_late_update_says_nothing(vit: Built) -> None:
    plan = plan_for(vit)
    announced = CoordinatorRun(plan)
    announced.online(*ABC)
    updates = {
        (1, "a"): make_update(plan, announced.announced, "a", metrics={}).update,
        (1, "b"): make_update(plan, announced.announced, "b", nll=0.5).update,
        (0, "c"): make_update(plan, announced.announced, "c").update,
    }
    assert likelihoods(updates, 1) == {"a": math.inf, "b": 0.5}


@pytest.mark.parametrize(
    ("canary", "devices", "count"), [("10%", 100, 10), ("10%", 101, 11), ("7%", 100, 7), ("5", 100, 5), ("100%", 4, 4)]
)
def test_a_share_or_a_number_of_devices_is_asked(canary: str, devices: int, count: int) -> None:
    assert asked(canary, devices) == count


@pytest.mark.parametrize("canary", ["0%", "101%", "2", 2, "-5", "ten", "10 %x", ""])
def test_an_impossible_number_of_canaries_is_refused(vit: Built, canary: object) -> None:
    with pytest.raises(ValueError, match="neither a share like 10% nor a number of at least 3 devices"):
        plan_for(vit, canary=canary)


def test_canaries_need_reports(vit: Built) -> None:
    with pytest.raises(ValueError, match="with --secure devices report no likelihoods"):
        plan_for(vit, canary="10%", secure=True)


# in a run


def closed(run: CoordinatorRun) -> list[ClosedRound]:
    return [command.closed for command in run.of(StoreRound)]


def until(run: CoordinatorRun, stage: Stage, index: int = 0, devices: list[str] = ABC) -> None:
    while (run.announced.stage, run.announced.index) != (stage, index):
        run.answers(devices)


def measured(run: CoordinatorRun, nlls: Losses) -> None:
    run.feed(*(make_update(run.plan, run.announced, name, nll=nll) for name, nll in nlls.items()))


def restarted(run: CoordinatorRun) -> None:
    run.state = Checkpoint.of(run.state).state(vectors_of(run.state))


def test_a_candidate_that_most_devices_lose_with_is_rejected_and_the_round_begins_again(vit: Built) -> None:
    run = started(vit)
    until(run, Stage.GLOBAL, 2)
    good, made = run.state.good.expert, run.announced.round - 2
    candidate = run.state.expert
    restarted(run)
    assert not np.array_equal(good, candidate) and np.array_equal(run.state.good.expert, good)
    measured(run, {"a": 1.4, "b": 1.4, "c": 0.5})
    record = closed(run)[-1]
    assert record.repeated == record.rejected
    assert record.rejected == (
        f"the candidate of round {made + 1} is rejected: 2 of 3 devices lose more than 0.3 nats of held-out "
        f"likelihood; the global expert of round {made} comes back"
    )
    assert record.rejected in next(log.text for log in run.of(Log) if log.warning)
    assert (run.announced.stage, run.announced.index) == (Stage.GLOBAL, 2)
    assert np.array_equal(run.state.expert, good)
    measured(run, {"a": 9.0, "b": 9.0, "c": 9.0})  # of the last good one itself: there is nothing to go back to
    assert (run.announced.index, closed(run)[-1].rejected) == (3, "")
    assert not np.array_equal(run.state.expert, good)
    run.until_stop(ABC)
    assert sum(bool(each.rejected) for each in closed(run)) == 1


@pytest.mark.parametrize("nlls", [{"a": 9.0, "b": 1.0, "c": 1.0}, {"a": 1.19, "b": 1.19, "c": 1.19}])
def test_one_false_report_or_small_losses_reject_nothing(vit: Built, nlls: Losses) -> None:
    run = started(vit)
    until(run, Stage.GLOBAL, 2)
    measured(run, nlls)
    assert run.announced.index == 3
    assert dict(run.state.good.nlls) == nlls


def test_late_updates_from_a_rejected_candidate_do_not_count(vit: Built) -> None:
    run = started(vit, list("abcd"), max_staleness=2, min_updates=3)
    until(run, Stage.GLOBAL, 2, list("abcd"))
    late = make_update(run.plan, run.announced, "d")
    run.now += ROUND_SECONDS
    measured(run, {"a": 9.0, "b": 9.0, "c": 9.0})
    assert closed(run)[-1].rejected
    run.feed_only(late)
    assert not run.state.updates


def test_the_last_candidate_of_stage_1_is_judged_in_the_first_round_of_stage_2(vit: Built) -> None:
    run = started(vit, head_sums=Sums.NONE)
    until(run, Stage.PERSONAL)
    good = run.state.good.expert
    measured(run, dict.fromkeys(ABC, 2.0))
    assert (run.announced.stage, run.announced.index) == (Stage.PERSONAL, 0)
    assert np.array_equal(run.state.expert, good)
    measured(run, dict.fromkeys(ABC, 2.0))
    assert run.announced.index == 1
    measured(run, dict.fromkeys(ABC, 9.0))  # the global expert does not change any more
    assert run.announced.stage is Stage.EVALUATE


def test_a_head_of_zeros_is_no_last_good_one(vit: Built) -> None:
    run = started(vit, head=Head.ZEROS)
    measured(run, dict.fromkeys(ABC, 0.1))
    assert not run.state.good.expert.size
    measured(run, dict.fromkeys(ABC, 9.0))
    assert run.announced.index == 2


def canary_round(vit: Built, **config: object) -> CoordinatorRun:
    run = started(vit, ABCDE, canary="10%", head_sums=Sums.NONE, **config)
    until(run, Stage.CANARY, devices=ABCDE)
    return run


def test_a_few_devices_measure_the_candidate_before_all_others_receive_it(vit: Built) -> None:
    run = canary_round(vit)
    candidate, asked = run.state.expert, run.announced.chosen
    assert len(asked) == 3 and run.announced.expert
    measured(run, dict.fromkeys(asked, 1.0))
    assert (run.announced.stage, run.announced.index) == (Stage.PERSONAL, 0)
    assert run.state.expert is candidate
    measured(run, dict.fromkeys(ABCDE, 2.0))  # all others may find what the canaries have not
    assert closed(run)[-1].rejected and run.announced.stage is Stage.PERSONAL


def test_the_canaries_reject_a_candidate_and_no_other_device_receives_it(vit: Built) -> None:
    run = canary_round(vit)
    candidate, good = run.announced, run.state.good.expert
    restarted(run)
    measured(run, dict(zip(candidate.chosen, (2.0, 2.0, 0.0), strict=True)))
    record = closed(run)[-1]
    assert (record.round.stage, record.repeated) == (Stage.CANARY, "") and "2 of 3 devices" in record.rejected
    assert (run.announced.stage, np.array_equal(run.state.expert, good)) == (Stage.PERSONAL, True)
    others = [c.round for c in run.of(AnnounceRound) if not c.round.chosen]
    assert candidate.expert not in {announced.expert for announced in others}
    run.until_stop(ABCDE)


def test_canaries_that_do_not_answer_are_replaced(vit: Built) -> None:
    run = canary_round(vit)
    first = run.announced
    measured(run, dict.fromkeys(first.chosen[:2], 9.0))
    run.now += ROUND_SECONDS
    run.feed()
    assert "got 2 updates, fewer than 3" in closed(run)[-1].repeated
    assert run.announced.stage is Stage.CANARY and run.announced.round == first.round + 1
    drawn = {first.chosen}
    for _ in range(MAX_REPEATS):
        drawn.add(run.announced.chosen)
        run.now += ROUND_SECONDS
        run.feed()
    assert len(drawn) > 1
    assert (run.announced.stage, run.announced.chosen, run.state.repeats) == (Stage.PERSONAL, (), 0)
    assert run.of(Log)[-1].text == "no canary round: fewer than 3 devices answer it"


def test_without_three_devices_there_is_no_canary_round(vit: Built) -> None:
    run = started(vit, ["a", "b"], canary="10%", head_sums=Sums.NONE)
    until(run, Stage.PERSONAL, devices=["a", "b"])
    assert any("no canary round" in log.text for log in run.of(Log))


def test_reports_of_hostile_devices_reject_nothing_in_a_run_with_noise(vit: Built) -> None:
    rule = replace(RULE, trigger=FixedSchedule(2))
    run = started(vit, privacy=PRIVACY, aggregation=MEAN, stage1_sal=rule, stage2_sal=rule)
    until(run, Stage.GLOBAL, 1)
    measured(run, dict.fromkeys(ABC, 9.0))
    assert (run.announced.index, closed(run)[-1].rejected) == (2, "")


# rollback


def kept(run: CoordinatorRun) -> str:
    """The present global expert as a server would keep it, by its SHA-256."""
    sha256 = f"{run.state.made:064x}"
    TENSORS[sha256] = {"expert": run.state.expert}
    return sha256


def roll_back(run: CoordinatorRun, made: int, sha256: str) -> list[Command]:
    return run.feed(OperatorActed(Operation(action=Action.ROLLBACK, round=made, sha256=sha256)))


def test_the_operator_returns_to_the_global_expert_of_an_earlier_round(vit: Built) -> None:
    run = started(vit)
    until(run, Stage.GLOBAL, 1)
    made, expert, sha256 = run.state.made, run.state.expert, kept(run)
    until(run, Stage.GLOBAL, 3)
    number = run.announced.round
    run.feed_only(make_update(run.plan, run.announced, "a"))
    roll_back(run, made, sha256)
    assert np.array_equal(run.state.expert, expert)
    assert (run.announced.round, run.announced.stage, run.announced.index) == (number + 1, Stage.GLOBAL, 3)
    assert not run.state.updates
    record = closed(run)[-1]
    assert (set(record.updates), record.repeated) == ({"a"}, f"rolled back to the global expert of round {made}")
    measured(run, dict.fromkeys(ABC, 9.0))  # the operator's choice is not judged
    assert not closed(run)[-1].repeated
    run.until_stop(ABC)


@pytest.mark.parametrize("stage", [Stage.HEAD, Stage.PERSONAL, Stage.EVALUATE, Stage.FINISHED])
def test_after_stage_1_a_rollback_begins_stage_2_again(vit: Built, stage: Stage) -> None:
    run = started(vit)
    until(run, Stage.GLOBAL, 1)
    made, expert, sha256 = run.state.made, run.state.expert, kept(run)
    until(run, stage)
    before = len(closed(run))
    roll_back(run, made, sha256)
    assert (run.announced.stage, run.announced.index) == (Stage.PERSONAL, 0)
    assert np.array_equal(run.state.expert, expert)
    assert np.array_equal(run.state.gate, vit.bundle.initial()[1])
    assert len(closed(run)) == before + (stage is not Stage.FINISHED)
    run.commands.clear()
    assert not run.until_stop(ABC).error


def test_a_paused_run_is_rolled_back_when_it_is_resumed(vit: Built) -> None:
    run = started(vit)
    until(run, Stage.GLOBAL, 1)
    made, sha256, number = run.state.made, kept(run), run.announced.round
    run.feed(OperatorActed(Operation(action=Action.PAUSE)))
    roll_back(run, made, sha256)
    assert run.announced.round == number
    run.feed(OperatorActed(Operation(action=Action.RESUME)))
    assert run.announced.round == number + 1


@pytest.mark.parametrize(("made", "sha256"), [(99, "0" * 64), (1, "")])
def test_a_rollback_needs_a_kept_global_expert(vit: Built, made: int, sha256: str) -> None:
    run = started(vit)
    until(run, Stage.GLOBAL, 1)
    before = run.state
    roll_back(run, made, sha256)
    assert run.state is before
    assert f"no global expert of round {made} is kept" in run.of(Log)[-1].text


def test_a_rollback_of_a_run_with_secure_updates_begins_its_sum_again(vit: Built) -> None:
    plan = plan_for(vit, secure=True)
    steps = plan.schedule
    first = next(position for position, step in enumerate(steps) if step.part == (Stage.GLOBAL, 0))
    for position, step in enumerate(steps):
        start = restart_position(plan, position)
        assert start == plan.positions_of(steps[start].part or (Stage.PERSONAL, 0)).start
        if step.part == (Stage.GLOBAL, 0):
            assert start == first
    assert steps[restart_position(plan, len(steps) - 1)].part == (Stage.PERSONAL, 0)


def test_no_rollback_asks_devices_again_for_updates_whose_masks_are_removed(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 3), secure=True, min_holders=1)
    for stage, index, is_possible in [
        (Stage.GLOBAL, 0, True),
        (Stage.UNMASK, None, False),
        (Stage.PERSONAL, 0, True),
        (Stage.EVALUATE, 0, False),
    ]:
        while run.announced.stage is not stage or index not in (None, run.announced.index):
            run.step()
        number = run.announced.round
        roll_back(run, run.state.made or 1, kept(run))
        assert (run.announced.round > number) is is_possible
        assert is_possible or "no rollback now: with --secure" in run.of(Log)[-1].text
    run.step()
    assert not run.of(Stop)[0].error


def test_the_latest_global_experts_are_kept(tmp_path: Path) -> None:
    experts = KeptExperts(tmp_path)
    assert (experts.rounds(), experts.copy(1, tmp_path)) == ([], "")
    for number in range(1, KEPT + 3):
        experts.write(number, np.full(3, number, np.float32))
    assert experts.rounds() == list(range(3, KEPT + 3))
    sha256 = experts.copy(5, tmp_path / "tensors")
    blob = (tmp_path / "tensors" / sha256).read_bytes()
    assert blob_hash(blob) == sha256 and load(blob)["expert"].tolist() == [5, 5, 5]
