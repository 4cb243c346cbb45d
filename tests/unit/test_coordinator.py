"""The coordinator as a state machine, with devices that answer at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.bundles import LAYERS, Built, build
from support.coordinators import (
    ABC,
    JOIN_SECONDS,
    MEAN,
    PRIVACY,
    ROUND_SECONDS,
    RULE,
    CoordinatorRun,
    head_statistics,
    make_update,
    plan_for,
    started,
    unchanged,
)

from fedfmsl.algorithms.class_means import class_mean_head
from fedfmsl.algorithms.discriminant import discriminant_head, logit_head, with_former_rows
from fedfmsl.algorithms.sal import AllAtOnce, CapabilityQueue, FixedSchedule
from fedfmsl.common.persistent_map import PersistentMap
from fedfmsl.protocol.messages import (
    MAX_NAMED,
    Encoding,
    Globals,
    Round,
    Stage,
    Sums,
    Training,
    Verdict,
    encode,
    parse,
)
from fedfmsl.protocol.tensors import unpack
from trainer_server.config import Aggregation, Head, Rule, Selection
from trainer_server.coordinator.events import (
    AnnounceRound,
    ClockTicked,
    CountRefusal,
    Log,
    PublishGlobals,
    SendAck,
    StatusSeen,
    Stop,
    StoreRound,
)
from trainer_server.coordinator.round_end import next_deadline
from trainer_server.coordinator.round_update import scaled_down
from trainer_server.coordinator.state import Accepted
from trainer_server.storage.checkpoint import Checkpoint, vectors_of

UNCAPPED = Aggregation(weight_cap=None)  # no device's sums are scaled down

# a whole run


@pytest.mark.parametrize("baseline", [True, False])
def test_a_run_goes_through_its_stages_in_order_and_stops(vit: Built, baseline: bool) -> None:
    run = started(vit, baseline=baseline)
    assert run.until_stop(ABC).error == ""
    announced = [command.round for command in run.of(AnnounceRound)]
    stages = [(r.stage.value, r.index, r.of) for r in announced]
    assert stages == [
        ("statistics", 0, 1),
        *(("global", index, 4) for index in range(4)),
        ("head", 0, 1),
        *(("personal", index, 2) for index in range(2)),
        *([("baseline", 0, 1)] if baseline else []),
        ("evaluate", 0, 1),
        ("finished", 0, 1),
    ]
    assert [r.round for r in announced] == list(range(1, len(announced) + 1))
    assert set(run.verdicts) == {Verdict.ACCEPTED}
    assert len(run.verdicts) == 3 * (len(announced) - 1)
    assert [record.closed.round.round for record in run.of(StoreRound)] == [r.round for r in announced[:-1]]


def test_a_run_starts_once_every_device_is_online(vit: Built) -> None:
    run = CoordinatorRun(plan_for(vit, devices=2))
    run.online("a")
    run.online("a", online=False)
    assert not run.of(AnnounceRound)
    run.online("b")
    run.now = JOIN_SECONDS - 1
    run.feed()
    assert not run.of(AnnounceRound)
    run.now = next_deadline(run.plan, run.state)
    run.feed()
    assert run.state.expected == {"b"}


def test_rounds_do_not_wait_for_a_paused_device_but_accept_its_update(vit: Built) -> None:
    run = started(vit)
    run.feed(StatusSeen(run.status("c", paused="81 °C")))
    run.answers(ABC)  # c was selected before it paused
    assert run.announced.stage is Stage.GLOBAL and run.state.expected == {"a", "b"} and not run.announced.chosen
    before = run.announced
    run.answers(["c"])  # c was resumed meanwhile
    assert run.announced == before and run.verdicts[-1] is Verdict.ACCEPTED
    run.feed(StatusSeen(run.status("c")))
    run.answers(["a", "b"])
    assert sorted(run.of(StoreRound)[-1].closed.updates) == ABC
    assert run.state.expected == set(ABC)
    assert [note.text for note in run.of(Log)][-2:] == ["c paused: 81 °C", "c resumes"]


@pytest.mark.parametrize("online", [True, False], ids=["without samples", "lost"])
def test_no_round_waits_for_a_device_that_cannot_take_part(vit: Built, online: bool) -> None:
    run = started(vit)
    run.answers("ab")
    run.feed(StatusSeen(run.status("c", online=online, error="no images in photos")))
    assert run.announced.stage is Stage.GLOBAL and run.state.expected == {"a", "b"}
    run.feed(StatusSeen(run.status("c", online=False)))  # a last will explains nothing
    assert run.state.expected == {"a", "b"}
    run.feed(StatusSeen(run.status("c")))
    run.answers("ab")
    assert run.state.expected == set(ABC)
    assert [note.text for note in run.of(Log)][3:] == [
        "c cannot take part: no images in photos",
        *(["c is offline"] if online else []),
        "c is online",
    ]


def test_a_round_that_nobody_can_answer_lasts_until_its_deadline(vit: Built) -> None:
    run = started(vit)
    run.feed(*(StatusSeen(run.status(name, online=False, error="no heartbeat")) for name in ABC))
    assert run.announced.round == 1
    run.now = next_deadline(run.plan, run.state)
    run.feed()
    assert run.of(StoreRound)[-1].closed.missing == tuple(ABC)


def test_paused_devices_count_as_joined(vit: Built) -> None:
    run = CoordinatorRun(plan_for(vit, devices=2))
    run.feed(*(StatusSeen(run.status(name, paused="outside of --hours")) for name in "ab"))
    assert run.announced.stage is Stage.STATISTICS and not run.state.expected
    run.feed(*(StatusSeen(run.status(name)) for name in "ab"))
    run.answers("ab")
    assert run.announced.stage is Stage.GLOBAL and run.state.expected == {"a", "b"}


def test_a_run_without_devices_stops_with_the_reason(vit: Built) -> None:
    run = CoordinatorRun(plan_for(vit))
    run.now = JOIN_SECONDS
    run.feed()
    (stop,) = run.of(Stop)
    assert "0 devices joined" in stop.error


def test_globals_are_published_before_they_are_announced(vit: Built) -> None:
    run = started(vit)
    run.until_stop(ABC)
    blobs: dict[str, bytes] = {}
    for command in run.commands:
        if isinstance(command, PublishGlobals):
            blobs[command.sha256] = command.blob
        if isinstance(command, AnnounceRound):
            announced, layout = command.round, run.plan.bundle.expert
            if announced.stage is Stage.STATISTICS:
                assert (announced.expert, announced.start, announced.gate) == ("", "", "")
                continue
            for kind, size in (("expert", layout.size(announced.level)), ("start", layout.size(1))):
                header, tensors = unpack(blobs[getattr(announced, kind)], Globals)
                assert header == Globals(run="r", kind=kind)
                assert layout.join(tensors).size == size
            assert run.plan.bundle.gate.join(unpack(blobs[announced.gate], Globals)[1]).any()


def test_the_global_expert_starts_from_the_class_means_of_all_devices(vit: Built) -> None:
    run = started(vit, aggregation=UNCAPPED)
    updates = [make_update(run.plan, run.announced, device) for device in ABC]
    run.feed(*updates)
    sums, counts, norms = (
        np.stack([np.asarray(update.tensors[name], np.float64) for update in updates]).sum(axis=0)
        for name in ("class_sums", "class_counts", "norm_sum")
    )
    wanted = class_mean_head(sums.astype(np.float32), counts.astype(np.float32), norms.item())
    head, initial = run.state.expert[: wanted.size], vit.bundle.initial()[0]
    assert np.allclose(head, wanted, rtol=1e-5)
    assert np.array_equal(run.state.expert[wanted.size :], initial[wanted.size :])
    assert np.array_equal(run.state.start, run.state.expert[: vit.bundle.expert.size(1)])


def test_stage_1_ends_with_the_discriminant_of_all_devices_as_head(vit: Built) -> None:
    run = started(vit, max_norm=1e9, aggregation=UNCAPPED)
    while run.announced.stage is not Stage.HEAD:
        run.answers(ABC)
    trained, announced, dims = run.state.expert.copy(), run.announced, vit.bundle.manifest.dims
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(vit.bundle.classes), 90)
    features = (
        rng.normal(size=(len(vit.bundle.classes), dims.feature))[labels] + rng.normal(size=(90, dims.feature))
    ).astype(np.float32)
    for device, rows in zip(ABC, np.split(np.arange(90), [10, 40]), strict=True):
        tensors = head_statistics(features[rows], labels[rows], len(vit.bundle.classes))
        run.feed(make_update(run.plan, announced, device, tensors=tensors, samples=len(rows)))
    assert run.announced.stage is Stage.PERSONAL
    together = head_statistics(features, labels, len(vit.bundle.classes))
    wanted = discriminant_head(*(together[name] for name in ("class_sums", "class_counts", "second_moments")))
    assert np.allclose(run.state.expert[: wanted.size], wanted, rtol=1e-3, atol=1e-4)
    assert np.array_equal(run.state.expert[wanted.size :], trained[wanted.size :])  # LoRA is unchanged
    published = [command.blob for command in run.of(PublishGlobals) if command.sha256 == run.announced.expert]
    sent = vit.bundle.expert.join(unpack(published[-1], Globals)[1])
    assert np.array_equal(sent, run.state.expert[: sent.size])


def test_the_head_of_logit_sums_is_their_discriminant_after_the_trained_head(vit: Built) -> None:
    run = started(vit, stage1_rounds=1, head_sums=Sums.LOGITS, aggregation=UNCAPPED)
    run.answers(ABC)
    run.answers(ABC)
    assert (run.announced.stage, run.announced.sums) == (Stage.HEAD, Sums.LOGITS)
    rng = np.random.default_rng(0)
    logits, labels = (
        rng.normal(size=(90, len(vit.bundle.classes))).astype(np.float32),
        np.arange(90) % (len(vit.bundle.classes) - 1),
    )
    logits[np.arange(90), labels] += 3
    before = run.state.expert[: vit.bundle.expert.size(0)]
    for device, rows in zip(ABC, np.split(np.arange(90), [10, 40]), strict=True):
        tensors = head_statistics(logits[rows], labels[rows], len(vit.bundle.classes))
        run.feed(make_update(run.plan, run.announced, device, tensors=tensors, samples=len(rows)))
    assert run.announced.stage is Stage.PERSONAL
    together = head_statistics(logits, labels, len(vit.bundle.classes))
    sums, counts, moments = (together[name] for name in ("class_sums", "class_counts", "second_moments"))
    wanted = with_former_rows(logit_head(before, sums, counts, moments), before, counts)  # the last class has no sample
    assert np.allclose(run.state.expert[: wanted.size], wanted, rtol=1e-3, atol=1e-4)


def test_a_head_round_in_which_no_class_has_enough_samples_keeps_the_trained_head(vit: Built) -> None:
    run = started(vit, stage1_rounds=1, head_sums=Sums.LOGITS)
    run.answers(ABC)
    run.answers(ABC)
    before, classes = run.state.expert, len(vit.bundle.classes)
    nothing = head_statistics(np.zeros((0, classes), np.float32), np.zeros(0, np.int64), classes)
    run.answers(ABC, tensors=nothing)
    assert run.announced.stage is Stage.PERSONAL and np.array_equal(run.state.expert, before)


@pytest.mark.parametrize(("nlls", "stays"), [((0.8, 1.04, 9.0), True), ((0.0, 1.06, 1.1), False)])
def test_the_head_of_the_sums_stays_unless_most_devices_are_worse_with_it(
    vit: Built, nlls: tuple[float, ...], stays: bool
) -> None:
    run = started(vit, stage1_rounds=1)
    run.answers(ABC)
    run.answers(ABC, nll=1.0)
    size, former = vit.bundle.expert.size(0), run.state.expert
    run.answers(ABC)
    run.state = Checkpoint.of(run.state).state(vectors_of(run.state))
    assert run.announced.stage is Stage.PERSONAL and not np.array_equal(run.state.expert[:size], former[:size])
    updates = [make_update(run.plan, run.announced, name, nll=each) for name, each in zip(ABC, nlls, strict=True)]
    logged = run.feed(*updates)
    assert np.array_equal(run.state.expert, former) != stays
    assert run.announced.stage is (Stage.PERSONAL if stays else Stage.GLOBAL)
    assert any(isinstance(note, Log) and "head of stage 1" in note.text for note in logged) != stays


def test_after_a_rejected_head_stage_1_trains_on_without_sums_and_stage_2_begins_again(vit: Built) -> None:
    run = started(vit, stage1_rounds=8, stage2_rounds=1, aggregation=MEAN)
    while run.announced.stage is not Stage.PERSONAL:
        run.answers(ABC, nll=1.0)
    run.answers(ABC, nll=9.0)
    found = []
    while not run.of(Stop):
        run.state = Checkpoint.of(run.state).state(vectors_of(run.state))
        found.append((run.announced.stage, run.announced.index, run.announced.sums))
        run.answers(ABC, nll=1.0)
    retrained = [(Stage.GLOBAL, index, Sums.NONE) for index in range(2, 8)]
    assert found == [*retrained, (Stage.PERSONAL, 0, Sums.NONE), (Stage.EVALUATE, 0, Sums.NONE)]


@pytest.mark.parametrize("rule", [Rule.SCREENED_MEAN, Rule.MEAN])
@pytest.mark.parametrize("secure_sums", [True, False])
def test_a_device_whose_updates_were_left_out_of_two_rounds_is_not_asked_for_its_sums(
    vit: Built, rule: Rule, secure_sums: bool
) -> None:
    names = ["a", "b", "c", "d"]
    aggregation = Aggregation(rule=rule)
    run = started(vit, names, stage1_rounds=3, head=Head.ZEROS, secure_sums=secure_sums, aggregation=aggregation)
    while run.announced.stage is Stage.GLOBAL:
        delta = vit.bundle.expert.split(np.ones(vit.bundle.expert.size(run.announced.level), np.float32))
        away = {"b": 1, "c": int(run.announced.index == 1)}  # c points away only once
        tensors = {name: {key: -t if away.get(name) else t for key, t in delta.items()} for name in names}
        logged = run.feed(*(make_update(run.plan, run.announced, name, tensors=tensors[name]) for name in names))
        run.state = Checkpoint.of(run.state).state(vectors_of(run.state))
    assert run.plan.schedule[run.state.position].purpose is Stage.HEAD
    is_asked = rule is Rule.MEAN
    assert run.state.expected == ({*names} if is_asked else {"a", "c", "d"})
    assert any(isinstance(note, Log) and "no sums of b" in note.text for note in logged) != is_asked


def test_a_run_with_privacy_has_no_head_round(vit: Built) -> None:
    names = [f"d{i}" for i in range(4)]
    rule = replace(RULE, trigger=FixedSchedule(2))
    run = started(vit, names, privacy=PRIVACY, aggregation=MEAN, stage1_sal=rule, stage2_sal=rule)
    stages = [step.stage for step in run.plan.schedule]
    assert stages == [Stage.STATISTICS, *[Stage.GLOBAL] * 4, *[Stage.PERSONAL] * 2, Stage.EVALUATE, Stage.FINISHED]


def test_by_default_nothing_is_sent_before_stage_1_which_starts_from_a_head_of_zeros(vit: Built) -> None:
    run = started(vit, head=Head.ZEROS)
    layout = vit.bundle.expert
    assert run.announced.stage is Stage.GLOBAL and not run.state.start[: layout.size(0)].any()
    assert {run.announced.expert, run.announced.start} <= {command.sha256 for command in run.of(PublishGlobals)}
    run.answers(ABC)
    first = run.state.expert[: layout.size(1)]
    assert first[: layout.size(0)].any() and np.array_equal(run.state.start, first)
    run.answers(ABC)
    assert np.array_equal(run.state.start, first)


def test_a_run_without_sums_has_no_head_round(vit: Built) -> None:
    run = started(vit, head=Head.ZEROS, head_sums=Sums.NONE)
    assert {step.stage for step in run.plan.schedule}.isdisjoint({Stage.STATISTICS, Stage.HEAD})


def test_the_global_expert_starts_from_the_zero_shot_head_and_no_class_sums_are_asked_for(clip: Built) -> None:
    run = started(clip, head=Head.ZERO_SHOT, aggregation=UNCAPPED)
    assert run.announced.sums is Sums.NONE
    updates = [make_update(run.plan, run.announced, device) for device in ABC]
    run.feed(*updates)
    layout, zero_shot = clip.bundle.expert, clip.bundle.task.zero_shot
    start = layout.split(run.state.start)
    assert not start["classifier.bias"].any()
    assert np.array_equal(run.state.start, run.state.expert[: layout.size(1)])
    assert zero_shot is not None
    norm = sum(u.tensors["norm_sum"].item() for u in updates) / sum(u.tensors["class_counts"].sum() for u in updates)
    assert np.allclose(start["classifier.weight"] * norm, zero_shot.scale * zero_shot.rows, rtol=1e-4)


def test_sal_raises_the_level_on_a_plateau_of_the_devices_accuracy_and_not_after_the_last_round(vit: Built) -> None:
    flat = started(vit, stage1_rounds=4)
    flat.until_stop(ABC)
    rising = started(vit, stage1_rounds=4)
    rising.until_stop(ABC, accuracy=lambda announced: 0.1 * announced.round)
    assert [c.round.level for c in flat.of(AnnounceRound) if c.round.stage is Stage.GLOBAL] == [1, 1, 2, 2]
    assert [c.round.level for c in flat.of(AnnounceRound)][-1] == 2
    assert {c.round.level for c in rising.of(AnnounceRound)} == {1}


def test_all_at_once_trains_every_level_from_the_first_round(vit: Built) -> None:
    run = started(vit, stage1_sal=replace(RULE, trigger=AllAtOnce()))
    run.until_stop(ABC)
    assert {command.round.level for command in run.of(AnnounceRound)} == {LAYERS}


def test_personal_rounds_use_the_sal_rule_and_training_of_stage_2(vit: Built) -> None:
    training, rule = Training(epochs=3, learning_rate=0.5), replace(RULE, trigger=CapabilityQueue(7, 0.02))
    run = started(vit, baseline=True, stage2=training, stage2_sal=rule)
    run.until_stop(ABC)
    for announced in (command.round for command in run.of(AnnounceRound)):
        personal = announced.stage in (Stage.PERSONAL, Stage.FINISHED)  # late devices follow the end
        assert (announced.training == training) == personal
        assert (announced.sal.trigger.window == 7) == personal
        early = announced.stage in (Stage.STATISTICS, Stage.GLOBAL)
        assert announced.sal.max_level == (LAYERS if early else announced.level)  # no higher than the global expert
        rounds = {Stage.BASELINE: run.plan.config.stage1_rounds, Stage.FINISHED: run.plan.config.stage2_rounds}
        assert announced.repetitions == rounds.get(announced.stage, 1)


# verdicts on updates


def test_duplicate_late_and_early_updates_get_their_verdicts_and_change_nothing(vit: Built) -> None:
    run = started(vit)
    first = run.announced
    run.answers(["a"])
    before = run.state
    (again,) = run.answers(["a"])
    assert isinstance(again, SendAck)  # a harmless resend is not refused
    run.feed(make_update(run.plan, first.model_copy(update={"round": 2}), "b"))
    assert run.state == before
    run.now = ROUND_SECONDS
    run.feed()
    before = run.state
    run.feed(make_update(run.plan, first, "c"), make_update(run.plan, first, "a"))
    assert run.state == before
    assert run.verdicts == [
        Verdict.ACCEPTED,
        Verdict.DUPLICATE,
        Verdict.REJECTED,
        Verdict.LATE,
        Verdict.DUPLICATE,
    ]


@pytest.mark.parametrize(
    ("stage", "change", "reason"),
    [
        (Stage.STATISTICS, {"run": "other"}, "belongs to run 'other'"),
        (Stage.STATISTICS, {"session": "before"}, "earlier session of this run"),
        (Stage.STATISTICS, {"stage": Stage.GLOBAL}, "but stage statistics was announced"),
        (Stage.STATISTICS, {"tensors": {}}, "0 tensors, expected 3"),
        (Stage.STATISTICS, {"tensors": {"class_sums": np.ones((1, 1), np.float32)}}, "expected 3"),
        (Stage.GLOBAL, {"tensors": {}}, "0 values"),
        (Stage.GLOBAL, {"tensors": {"classifier.weight": np.full((4, 32), np.nan, np.float32)}}, "not finite"),
        (Stage.GLOBAL, {"tensors": {"classifier.weight": np.ones((4, 32))}}, "float64"),
        (Stage.PERSONAL, {"tensors": {"gate.down.weight": np.ones((16, 32), np.float32)}}, "512 values, expected 562"),
        (Stage.EVALUATE, {"tensors": {"local": np.ones(1, np.float32)}}, "takes no tensors"),
    ],
)
def test_an_invalid_update_is_rejected_with_its_reason(
    vit: Built, stage: Stage, change: dict[str, Any], reason: str
) -> None:
    run = started(vit, stage1_rounds=1, stage2_rounds=1)
    while run.announced.stage is not stage:
        run.answers(ABC)
    before = run.state
    (reply, refusal) = run.answers(["a"], **change)
    assert isinstance(reply, SendAck)
    assert reply.ack.verdict is Verdict.REJECTED
    assert reason in reply.ack.reason
    assert isinstance(refusal, CountRefusal)
    assert unchanged(run.state, before)
    run.answers(["a"])
    assert run.verdicts[-1] is Verdict.ACCEPTED  # a valid one of the same device still counts


def test_an_update_with_blocks_above_the_announced_level_is_rejected_and_one_below_is_not(vit: Built) -> None:
    run = started(vit, stage1_sal=replace(RULE, trigger=AllAtOnce(), max_level=2))
    run.answers(ABC)
    for device, level in zip(ABC, (1, 2, 3), strict=True):
        run.feed(make_update(run.plan, run.announced.model_copy(update={"level": level}), device))
    assert run.verdicts[3:] == [Verdict.ACCEPTED, Verdict.ACCEPTED, Verdict.REJECTED]


def test_a_device_that_joins_during_a_round_counts_but_is_not_awaited(vit: Built) -> None:
    run = started(vit)
    run.online("late")
    run.answers(["late", *ABC])
    assert set(run.verdicts) == {Verdict.ACCEPTED}
    assert run.of(StoreRound)[0].closed.updates.keys() == {"late", *ABC}
    assert run.state.expected == {"late", *ABC}


def test_the_last_will_of_an_earlier_process_does_not_take_a_device_offline(vit: Built) -> None:
    run = CoordinatorRun(plan_for(vit, devices=2))
    run.feed(StatusSeen(run.status("a", instance="new")))
    run.feed(StatusSeen(run.status("a", instance="old", online=False)))
    assert run.state.online == {"a"}
    run.feed(StatusSeen(run.status("a", instance="new", online=False)))
    assert not run.state.online


# deadlines and repeated rounds


def test_a_round_closes_at_its_deadline_without_stragglers(vit: Built) -> None:
    run = started(vit)
    run.answers(["a", "c"])
    run.online("b", online=False)
    run.now = next_deadline(run.plan, run.state) - 0.1
    assert run.feed() == []
    run.now = next_deadline(run.plan, run.state)
    run.feed()
    closed = run.of(StoreRound)[0].closed
    assert (closed.missing, closed.repeated, closed.updates.keys()) == (("b",), "", {"a", "c"})
    assert run.announced.stage is Stage.GLOBAL
    assert run.state.expected == {"a", "c"}


def test_a_round_with_too_few_updates_is_repeated_until_the_run_fails(vit: Built) -> None:
    run = started(vit, min_updates=2, max_repeats=2)
    run.answers(ABC)
    expert, index = run.state.expert, run.announced.index
    for repeat in range(3):
        assert (run.announced.stage, run.announced.index) == (Stage.GLOBAL, index), repeat
        run.answers(["a"])
        run.now += ROUND_SECONDS
        run.feed()
    (stop,) = run.of(Stop)
    assert "3 times in a row" in stop.error
    assert run.announced.stage is Stage.FINISHED  # so that devices exit too
    assert np.array_equal(run.state.expert, expert)
    assert [bool(record.closed.repeated) for record in run.of(StoreRound)] == [False, True, True, True]


def test_a_successful_round_resets_the_count_of_repeats(vit: Built) -> None:
    run = started(vit, max_repeats=1)
    for _ in range(3):
        run.now += ROUND_SECONDS
        run.feed()
        run.answers(ABC)
    assert not run.of(Stop)


def test_a_round_without_online_devices_waits_for_its_deadline(vit: Built) -> None:
    run = started(vit)
    run.online(*ABC, online=False)
    run.now = ROUND_SECONDS
    run.feed()
    assert run.state.expected == frozenset()
    number = run.announced.round
    run.feed(*[ClockTicked()] * 20)
    run.online("a")
    assert run.announced.round == number
    run.answers(["a"])
    assert run.verdicts == [Verdict.ACCEPTED]


def test_a_device_with_another_bundle_or_an_error_is_excluded_and_logged(vit: Built, dinov2: Built) -> None:
    run = CoordinatorRun(plan_for(vit, devices=2))
    other = run.status("x", bundle=dinov2.bundle.sha256)
    run.feed(StatusSeen(other), StatusSeen(run.status("y", online=False, error="no images")))
    run.online("a")
    assert not run.of(AnnounceRound)
    run.online("b")
    assert run.state.expected == {"a", "b"}
    notes = " | ".join(note.text for note in run.of(Log))
    assert "x cannot take part: it has another bundle" in notes
    run.feed(StatusSeen(other), StatusSeen(run.status("x", online=False, error="run 'r' uses another bundle")))
    assert [note.text.startswith("x ") for note in run.of(Log)].count(True) == 1
    assert "y cannot take part: no images" in notes


def test_a_run_without_enough_devices_ends_with_a_remedy(vit: Built) -> None:
    run = CoordinatorRun(plan_for(vit))
    run.now = JOIN_SECONDS
    run.feed()
    (stop,) = run.of(Stop)
    assert "0 devices joined within 50 s" in stop.error
    assert "--run r and this broker, or raise --join-timeout" in stop.error


# determinism


def test_the_order_of_arrival_does_not_change_a_bit_of_the_globals(vit: Built) -> None:
    finals, hashes = [], []
    for order in (ABC, ABC[::-1], ["b", "a", "c"]):
        run = started(vit)
        run.until_stop(order)
        finals.append((run.state.expert.tobytes(), run.state.gate.tobytes(), run.state.start.tobytes()))
        hashes.append([(c.round.expert, c.round.start, c.round.gate) for c in run.of(AnnounceRound)])
    assert finals[0] == finals[1] == finals[2]
    assert hashes[0] == hashes[1] == hashes[2]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("status"), st.sampled_from(ABC), st.booleans(), st.sampled_from(["", "f" * 64])),
        st.tuples(
            st.just("update"),
            st.sampled_from(ABC),
            st.integers(-2, 1),
            st.sampled_from(["", "run", "stage", "no tensors", "nan", "lower level"]),
        ),
        st.tuples(st.just("clock"), st.sampled_from([-5.0, 0.0, 1.0, ROUND_SECONDS])),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.integers(1, 2))
def test_no_sequence_of_events_raises_and_no_update_counts_twice(vit: Built, events: Any, min_updates: int) -> None:
    run = CoordinatorRun(
        plan_for(vit, devices=2, min_updates=min_updates, stage1_rounds=2, stage2_rounds=1, max_repeats=2)
    )
    run.online("a", "b")
    for kind, *detail in events:
        if run.of(Stop):
            break
        if kind == "status":
            device, online, bundle = detail
            run.feed(StatusSeen(run.status(device, online=online, bundle=bundle or run.plan.bundle.sha256)))
        elif kind == "clock":
            run.now += detail[0]
            run.feed()
        else:
            device, shift, flaw = detail
            announced = run.announced.model_copy(update={"round": max(run.announced.round + shift, 0)})
            event, change = make_update(run.plan, announced, device), dict[str, Any]()
            if flaw == "run":
                change = {"run": "other"}
            elif flaw == "stage":
                change = {"stage": Stage.FINISHED}
            elif flaw == "no tensors":
                change = {"tensors": {}}
            elif flaw == "nan":
                change = {"tensors": {name: np.full_like(tensor, np.nan) for name, tensor in event.tensors.items()}}
            elif flaw == "lower level":
                change = {"tensors": dict(list(event.tensors.items())[:2]), "samples": 0}
            run.feed(make_update(run.plan, announced, device, **change))
    accepted = [(r.ack.round, r.ack.device) for r in run.of(SendAck) if r.ack.verdict is Verdict.ACCEPTED]
    assert len(accepted) == len(set(accepted))
    counted = [(r.closed.round.round, name) for r in run.of(StoreRound) for name in r.closed.updates]
    assert sorted(counted) == sorted(pair for pair in accepted if pair[0] != run.state.round or run.of(Stop))
    assert np.isfinite(run.state.expert).all()
    rounds = [command.round.round for command in run.of(AnnounceRound)]
    assert rounds == list(range(1, len(rounds) + 1))


# client selection, and when a round is complete


def trained(run: CoordinatorRun) -> CoordinatorRun:
    """The run in its first round of stage 1."""
    run.answers(ABC)
    assert run.announced.stage is Stage.GLOBAL
    return run


def test_a_training_round_closes_once_the_required_share_has_answered(vit: Built) -> None:
    run = started(vit, enough=0.6)
    run.answers(["a", "b"])
    assert run.announced.stage is Stage.STATISTICS  # the statistics round waits for all devices
    run.answers(["c"])
    run.answers(["b"])
    assert run.announced.index == 0
    run.answers(["c"])
    assert run.announced.index == 1
    closed = run.of(StoreRound)[-1].closed
    assert (closed.updates.keys(), closed.missing, closed.repeated) == ({"b", "c"}, ("a",), "")


def test_the_required_share_is_at_least_the_minimum_of_updates(vit: Built) -> None:
    run = trained(started(vit, enough=0.1, min_updates=2))
    run.answers(["a"])
    assert run.announced.index == 0
    run.answers(["b"])
    assert run.announced.index == 1


def test_random_selection_asks_a_share_of_the_devices_and_rejects_others(vit: Built) -> None:
    names = [f"d{i}" for i in range(10)]
    run = started(vit, names, select=Selection.RANDOM, fraction=0.3, stage1_rounds=6)
    run.answers(names)
    asked = []
    while run.announced.stage is Stage.GLOBAL:
        chosen = run.announced.chosen
        assert len(chosen) == 3
        asked.append(chosen)
        (unselected, *_) = set(names) - set(chosen)
        reply, _ = run.answers([unselected])
        assert reply.ack.verdict is Verdict.REJECTED
        assert "was not selected" in reply.ack.reason
        run.answers(chosen)
    assert len(set(asked)) > 1
    again = started(vit, names, select=Selection.RANDOM, fraction=0.3, stage1_rounds=6)
    again.answers(names)
    assert again.announced.chosen == asked[0]
    run.until_stop(names)
    assert [c.round.chosen for c in run.of(AnnounceRound) if c.round.stage in (Stage.STATISTICS, Stage.EVALUATE)] == [
        (),
        (),
    ]


def test_selection_by_capability_asks_devices_that_can_train_the_whole_level(vit: Built) -> None:
    rule = replace(RULE, trigger=AllAtOnce(), max_level=2)
    run = CoordinatorRun(plan_for(vit, select=Selection.CAPABLE, stage1_sal=rule))
    run.feed(*(StatusSeen(run.status(name, level_cap=cap)) for name, cap in zip(ABC, (1, 2, 3), strict=True)))
    run.answers(ABC)
    assert run.announced.chosen == ("b", "c")
    run.answers(["b", "c"])
    assert run.announced.index == 1


def test_if_too_few_devices_can_train_the_level_the_most_capable_are_selected(vit: Built) -> None:
    rule = replace(RULE, trigger=AllAtOnce(), max_level=3)
    run = CoordinatorRun(plan_for(vit, select=Selection.CAPABLE, stage1_sal=rule, min_updates=2))
    run.feed(*(StatusSeen(run.status(name, level_cap=cap)) for name, cap in zip(ABC, (1, 2, 1), strict=True)))
    run.answers(ABC)
    assert run.announced.chosen == ("a", "b")


# late updates


def test_a_late_update_counts_with_a_discount_if_the_settings_allow_it(vit: Built) -> None:
    """Two updates with equal samples, one of them a round late: it has 1/√2 of its weight."""
    run = trained(started(vit, max_staleness=1, enough=0.6, aggregation=MEAN))
    first = run.announced
    run.answers(["a", "b"])
    second, before = run.announced, run.state.expert
    assert second.index == 1
    late, fresh = make_update(run.plan, first, "c", samples=10), make_update(run.plan, second, "a", samples=10)
    run.feed(late, fresh)
    assert run.verdicts[-2:] == [Verdict.ACCEPTED, Verdict.ACCEPTED]
    assert run.announced.index == 2
    layout = vit.bundle.expert
    deltas = [layout.join(event.tensors).astype(np.float64) for event in (late, fresh)]
    wanted = before[: deltas[0].size] + np.average(deltas, axis=0, weights=[0.5**0.5, 1])
    assert np.allclose(run.state.expert[: wanted.size], wanted, atol=1e-6)
    run.feed(late)
    assert run.verdicts[-1] is Verdict.DUPLICATE


def test_updates_that_are_too_late_or_of_an_earlier_stage_do_not_count(vit: Built) -> None:
    run = trained(started(vit, max_staleness=1, enough=0.3, stage1_rounds=3))
    first = run.announced
    run.answers(["a"])
    run.answers(["a"])
    run.feed(make_update(run.plan, first, "b"))
    assert run.verdicts[-1] is Verdict.LATE
    last = run.announced
    run.answers(["a"])
    assert run.announced.stage is Stage.HEAD
    run.feed(make_update(run.plan, last, "b"))
    assert run.verdicts[-1] is Verdict.LATE


def test_a_late_update_of_a_device_that_was_not_selected_does_not_count(vit: Built) -> None:
    names = [f"d{i}" for i in range(4)]
    run = started(vit, names, select=Selection.RANDOM, fraction=0.5, max_staleness=1)
    run.answers(names)
    first = run.announced
    (unselected, *_) = set(names) - set(first.chosen)
    run.answers(first.chosen)
    reply, _ = run.feed(make_update(run.plan, first, unselected))
    assert "was not selected" in reply.ack.reason
    forged = make_update(run.plan, first, first.chosen[0], stage=Stage.PERSONAL, round=first.round)
    assert run.feed(forged)[0].ack.verdict is not Verdict.ACCEPTED


# limits


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"samples": 1001}, "claims 1001 samples, more than 1000"),
        ({"level": 0}, "not as many as level 0 has"),
        ({"level": 3}, "above the announced 1"),
    ],
)
def test_an_update_that_claims_too_much_is_rejected(vit: Built, change: dict[str, Any], reason: str) -> None:
    run = trained(started(vit, max_samples=1000))
    reply, refusal = run.answers(["a"], **change)
    assert reply.ack.verdict is Verdict.REJECTED
    assert reason in reply.ack.reason
    assert refusal.device == "a"


def test_an_update_of_too_large_a_norm_is_rejected(vit: Built) -> None:
    run = trained(started(vit, max_norm=5.0))
    (reply, _) = run.answers(["a"])
    assert "norm is" in reply.ack.reason
    small = {
        name: tensor * np.float32(0.01) for name, tensor in make_update(run.plan, run.announced, "a").tensors.items()
    }
    (reply, *_) = run.answers(["a"], tensors=small)
    assert reply.ack.verdict is Verdict.ACCEPTED


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ({"class_counts": -1.0}, "negative counts"),
        ({"class_counts": 1e9}, "counts 4000000000 images"),
        ({"norm_sum": 1e-3}, "longer than its sum of norms"),
        ({"norm_sum": 1e9}, "sum of norms is"),
    ],
)
def test_contradictory_statistics_are_rejected(vit: Built, flaw: dict[str, float], reason: str) -> None:
    run = started(vit)
    tensors = dict(make_update(run.plan, run.announced, "a").tensors)
    for name, value in flaw.items():
        tensors[name] = np.full_like(tensors[name], value)
    (reply, _) = run.answers(["a"], tensors=tensors)
    assert reply.ack.verdict is Verdict.REJECTED
    assert reason in reply.ack.reason


def at_head_round(run: CoordinatorRun) -> CoordinatorRun:
    while run.announced.stage is not Stage.HEAD:
        run.answers(ABC)
    return run


def diagonal(width: int, value: float) -> NDArray[np.float32]:
    """The upper triangle of a diagonal matrix (width, width), row by row."""
    return (value * np.eye(width))[np.triu_indices(width)].astype(np.float32)


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ({"class_counts": np.full(4, -1.0)}, "negative counts"),
        ({"class_counts": np.zeros(4)}, "do not fit"),
        ({"class_counts": np.full(4, 1e9)}, "counts 4000000000 images"),
        ({"class_counts": np.array([9.0, 9, 9, 0])}, "do not fit"),  # the last class has a sum, but no images
        ({"class_sums": np.full((4, 32), 99.0)}, "do not fit"),
        ({"class_sums": np.full((4, 32), 3e38)}, "do not fit"),
        ({"class_sums": np.full((4, 32), np.nan)}, "not finite"),
        ({"second_moments": np.full(32 * 33 // 2, np.inf)}, "not finite"),
        ({"second_moments": np.zeros(32 * 33 // 2)}, "do not fit"),
        ({"second_moments": -diagonal(32, 1e3)}, "do not fit"),
        ({"second_moments": diagonal(32, 1e3) + 1e30 * (diagonal(32, 1) == 0)}, "do not fit"),  # off the diagonal
        ({"second_moments": diagonal(32, 1e30)}, "root of the sum of squares is"),
        ({"second_moments": np.zeros(32)}, "second_moments"),
    ],
)
def test_head_statistics_that_no_features_have_are_rejected(
    vit: Built, flaw: dict[str, NDArray[np.float64]], reason: str
) -> None:
    run = at_head_round(started(vit))
    tensors = dict(make_update(run.plan, run.announced, "a").tensors)
    before = run.state
    reply, refusal = run.answers(
        ["a"], tensors={**tensors, **{name: np.asarray(value, np.float32) for name, value in flaw.items()}}
    )
    assert (reply.ack.verdict, refusal.kind) == (Verdict.REJECTED, "tensors")
    assert reason in reply.ack.reason
    assert unchanged(run.state, before)
    (reply, *_) = run.answers(["a"], tensors=tensors)
    assert reply.ack.verdict is Verdict.ACCEPTED


def test_the_largest_update_may_be_the_one_of_the_head_round(vit_folder: Path, tmp_path: Path) -> None:
    run = at_head_round(started(build(vit_folder, tmp_path / "low", levels=1), stage1_sal=replace(RULE, max_level=1)))
    values = sum(tensor.size for tensor in make_update(run.plan, run.announced, "a").tensors.values())
    assert run.plan.largest_update == values > run.plan.bundle.expert.total


@pytest.mark.parametrize("size", [1, 2, 300])
def test_head_statistics_of_real_features_are_accepted(vit: Built, size: int) -> None:
    """Also with a single image, whose scatter is zero but for rounding, and with a large mean."""
    run, rng = at_head_round(started(vit)), np.random.default_rng(size)
    features = rng.normal(20, 1e-2, (size, vit.bundle.manifest.dims.feature)).astype(np.float32)
    (reply, *_) = run.answers(["a"], samples=size, tensors=head_statistics(features, rng.integers(0, 4, size), 4))
    assert reply.ack.verdict is Verdict.ACCEPTED, reply.ack.reason


def test_a_device_that_has_not_announced_itself_is_refused(vit: Built) -> None:
    run = started(vit)
    (reply, _) = run.answers(["unknown"])
    assert reply.ack.reason == "has not announced itself"


# contradictory settings


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"min_updates": 4}, "--min-updates 4 is more than --devices 3"),
        ({"fraction": 0.5}, "--select random"),
        ({"privacy": PRIVACY, "aggregation": MEAN}, "capability queue"),
        ({"privacy": PRIVACY, "max_staleness": 1}, "in time"),
        ({"privacy": PRIVACY, "aggregation": Aggregation(rule=Rule.MEDIAN)}, "leave out --rule"),
        ({"privacy": PRIVACY, "aggregation": MEAN, "encoding": Encoding.INT8}, "unrounded"),
    ],
)
def test_contradictory_settings_are_refused(vit: Built, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan_for(vit, **change)


# attacks by a single device


def test_a_hostile_update_is_bounded_by_the_honest_ones_and_named(vit: Built) -> None:
    """Alone it would move the globals as far as `max_norm` allows, in every round and with any weight."""
    names = ["a", "b", "c", "d"]
    for aggregation in (Aggregation(), Aggregation(rule=Rule.MEDIAN), MEAN):
        run = started(vit, names, aggregation=aggregation, stage1_rounds=8)
        run.answers(names)
        for _ in range(8):
            before, announced = run.state.expert, run.announced
            updates = [make_update(run.plan, announced, name) for name in names]
            honest = [vit.bundle.expert.join(event.tensors) for event in updates[:3]]
            size = honest[0].size
            attack = vit.bundle.expert.split(np.full(size, 999 / size**0.5, np.float32))
            logged = run.feed(*updates[:3], make_update(run.plan, announced, "d", tensors=attack, samples=1_000_000))
            moved = float(np.linalg.norm(run.state.expert[:size] - before[:size]))
            assert moved < 2 * float(np.median([np.linalg.norm(update) for update in honest]))
            assert any("d (999)" in note.text for note in logged if isinstance(note, Log))
        assert run.announced.stage is Stage.HEAD and run.state.norms == ()


def test_the_log_names_only_devices_whose_updates_are_much_larger_than_the_others(vit: Built) -> None:
    run = started(vit, [*"abcd"])
    run.answers([*"abcd"])
    for sizes, text in (((1, 1, 1, 2.9), ""), ((1, 1, 1, 3.1), "d (3.1)"), ((1, 4, 4, 4), "most updates")):
        headers = {name: make_update(run.plan, run.announced, name).update for name in "abcd"}
        norms = dict(zip("abcd", sizes, strict=True))
        updates = {(1, name): Accepted(header, "", 0, norms[name]) for name, header in headers.items()}
        noted = scaled_down(run.plan, replace(run.state, updates=PersistentMap(updates), norms=(1.0, 1.0)))
        assert text in noted and bool(noted) == bool(text) and "a (" not in noted


def test_a_device_whose_updates_undo_those_of_others_is_left_out_and_named(vit: Built) -> None:
    names = ["a", "b", "c", "d"]
    run = started(vit, names, stage1_rounds=2)
    run.answers(names)
    size = vit.bundle.expert.size(1)
    rng = np.random.default_rng(0)
    shared = rng.normal(size=size)
    for _index in range(2):
        before, announced = run.state.expert[:size], run.announced
        vectors = [(shared + rng.normal(size=size)).astype(np.float32) for _ in names]
        vectors[3] = -vectors[3]
        updates = [
            make_update(run.plan, announced, name, tensors=vit.bundle.expert.split(vector), samples=10)
            for name, vector in zip(names, vectors, strict=True)
        ]
        logged = run.feed(*updates)
        (note,) = [note for note in logged if isinstance(note, Log) and "left out" in note.text]
        assert "d (-" in note.text and "a (" not in note.text
        assert np.allclose(run.state.expert[:size] - before, np.mean(vectors[:3], axis=0), atol=1e-4)
        run.state = Checkpoint.of(run.state).state(vectors_of(run.state))
        assert sorted(run.state.agreements) == names
    run.answers(names)
    run.answers(names)
    assert run.announced.stage is Stage.PERSONAL and run.announced.index == 1
    assert min(run.state.agreements.values()) > -0.3  # stage 2 has begun anew


def test_a_device_that_is_alone_in_a_round_is_bounded_by_earlier_rounds(vit: Built) -> None:
    run = trained(started(vit, min_updates=1))
    run.answers(ABC)
    size = vit.bundle.expert.size(1)
    before, limit = run.state.expert[:size], 2 * run.state.norms[0]
    attack = vit.bundle.expert.split(np.full(size, 9.0, np.float32))
    run.feed(make_update(run.plan, run.announced, "a", tensors=attack))
    run.now = next_deadline(run.plan, run.state)
    run.feed()
    assert run.announced.index == 2
    assert float(np.linalg.norm(run.state.expert[:size] - before)) <= limit * (1 + 1e-5)


@pytest.mark.parametrize("lie", [0.0, 1.0])
def test_a_false_accuracy_of_many_samples_does_not_steer_the_level(vit: Built, lie: float) -> None:
    runs = [started(vit, ["a", "b", "c", "d"]) for _ in range(2)]
    for run in runs:
        run.answers(["a", "b", "c", "d"])
    for index in range(4):
        for run, false in zip(runs, (False, True), strict=True):
            honest = [make_update(run.plan, run.announced, name, accuracy=0.5 + 0.1 * index) for name in "abc"]
            change = {"accuracy": lie, "samples": 1_000_000} if false else {"accuracy": 0.5 + 0.1 * index}
            run.feed(*honest, make_update(run.plan, run.announced, "d", **change))
    assert runs[0].state.sal.level == runs[1].state.sal.level == 1  # a steady gain activates no block


@pytest.mark.parametrize("accuracy", [1e308, -0.1, 1.1])
def test_an_accuracy_outside_of_0_to_1_is_rejected(vit: Built, accuracy: float) -> None:
    """Weighted by samples it would be infinite, and a checkpoint cannot store that."""
    run = trained(started(vit))
    reply, refusal = run.answers(["a"], accuracy=accuracy)
    assert reply.ack.verdict is Verdict.REJECTED
    assert (refusal.device, refusal.kind) == ("a", "metrics")


def test_a_repeated_round_asks_every_device(vit: Built) -> None:
    """Else a device that claims the highest level and never answers would be the only one selected."""
    rule = replace(RULE, trigger=AllAtOnce())
    run = CoordinatorRun(plan_for(vit, select=Selection.CAPABLE, stage1_sal=rule, min_updates=1))
    run.feed(*(StatusSeen(run.status(name, level_cap=cap)) for name, cap in zip(ABC, (1, 1, 1024), strict=True)))
    trained(run)
    assert run.announced.chosen == ("c",)
    run.now += ROUND_SECONDS
    run.feed()
    assert (run.announced.stage, run.announced.chosen, run.state.expected) == (Stage.GLOBAL, (), frozenset(ABC))


def test_devices_can_read_the_longest_announcement(vit: Built) -> None:
    names = [f"{number:064}" for number in range(MAX_NAMED)]
    longest = trained(started(vit)).announced.model_copy(update={"chosen": tuple(names)})
    assert parse(Round, encode(longest)) == longest


@pytest.mark.parametrize("name", ["class_sums", "class_counts"])
def test_statistics_with_noise_are_bounded_too(vit: Built, name: str) -> None:
    rule = replace(RULE, trigger=FixedSchedule(2))
    run = started(vit, privacy=PRIVACY, aggregation=MEAN, stage1_sal=rule, stage2_sal=rule)
    tensors = dict(make_update(run.plan, run.announced, "a").tensors)
    reply, *_ = run.answers(["a"], tensors={**tensors, name: np.full_like(tensors[name], 1e38)})
    assert (reply.ack.verdict, "norm is" in reply.ack.reason) == (Verdict.REJECTED, True)
    reply, *_ = run.answers(["a"], tensors=tensors)
    assert reply.ack.verdict is Verdict.ACCEPTED
