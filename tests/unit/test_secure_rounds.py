"""Secure sums between the coordinator and the daemon's code, with lost devices and refused requests."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from support.bundles import Built
from support.coordinators import make_update, plan_for
from support.in_process_daemon import make_daemon, no_report
from support.secure_devices import SecureDevice, SecureRun, secure_devices
from support.training_contexts import announced_round

from devices.provisioning.authority import CLIENT, make_authority
from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.data.folder import SampleFolder
from edge_runtime.settings import Secure
from edge_runtime.store.secure_store import NoKeysError, SecureRecord, SecureStore
from fedfmsl.algorithms.aggregation import Contribution, WeightedMean
from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.fixed_point import fixed_point, numbers
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import AllAtOnce, FixedSchedule, Sal
from fedfmsl.algorithms.secure_aggregation import KEY_BYTES, SHARE_BYTES, VECTORS
from fedfmsl.algorithms.weighted_sums import FRACTION_BITS, weighted_mean, weighted_update, weighted_values
from fedfmsl.errors import MessageError, RunError
from fedfmsl.protocol.messages import EXCHANGE, Encoding, Globals, Round, Stage, Sums, Verdict
from fedfmsl.protocol.secure_sums import SignedKeys
from fedfmsl.protocol.tensors import blob_hash, pack, unpack
from trainer_server.config import Aggregation, Head, Rule
from trainer_server.coordinator.events import (
    AnnounceRound,
    ClockTicked,
    Log,
    PublishGlobals,
    SendAck,
    StatusSeen,
    StoreRound,
)
from trainer_server.coordinator.refusals import LEFT_OUT_SUMS

SEVEN = 7  # of seven, five shares recover a seed


@pytest.mark.parametrize(
    "lost",
    [
        {},
        {(Stage.SHARES, 0): ["d0"]},
        {(Stage.HOLDERS, 0): ["d1"], (Stage.UNMASK, 0): ["d2"]},
        {(Stage.STATISTICS, 0): ["d0"], (Stage.UNMASK, 1): ["d3"]},
        {(Stage.HEAD, 0): ["d6"], (Stage.UNMASK, 3): ["d5"]},
    ],
)
def test_the_sums_are_exactly_those_of_the_devices_that_answered(
    vit: Built, tmp_path: Path, lost: dict[tuple[Stage, int], list[str]]
) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, SEVEN))
    run.until(Stage.GLOBAL, lost)
    assert [c.round.stage for c in run.of(AnnounceRound)] == [
        *(Stage.KEYS, Stage.SHARES, Stage.HOLDERS, Stage.UNMASK, Stage.STATISTICS, Stage.UNMASK, Stage.GLOBAL),
    ]
    assert len(run.of(AnnounceRound)[4].round.classes) == len(vit.bundle.classes) - 1  # one has one holder
    assert run.announced.sums is run.plan.config.head_sums  # the head of stage 1 will be replaced
    asked = set(run.of(AnnounceRound)[4].round.chosen)
    counted = asked - set(lost.get((Stage.STATISTICS, 0), ()))
    plain = SecureRun(vit, [d for d in secure_devices(vit, tmp_path, SEVEN) if d.name in counted], masks=False)
    plain.until(Stage.GLOBAL)
    assert run.state.expert.any() and np.array_equal(run.state.expert, plain.state.expert)
    run.until(Stage.PERSONAL, lost)
    assert not any("no secure aggregation" in command.text for command in run.of(Log))
    head_size = vit.bundle.expert.size(0)
    assert not np.array_equal(run.state.expert[:head_size], plain.state.expert[:head_size])
    assert not run.state.secure.roster


@pytest.mark.parametrize(
    ("lost", "stages", "reason"),
    [
        ({(Stage.KEYS, 0): ["d0", "d1", "d2", "d3", "d4"]}, [Stage.KEYS] * 3, "got 2 updates"),
        (
            {(Stage.UNMASK, 0): ["d0", "d1", "d2"]},
            [Stage.KEYS, Stage.SHARES, Stage.HOLDERS, *[Stage.UNMASK] * 3],
            "got 4 updates, too few to remove the masks",
        ),
        (
            {(Stage.STATISTICS, 0): ["d0", "d1", "d2"]},
            [Stage.KEYS, Stage.SHARES, Stage.HOLDERS, Stage.UNMASK, Stage.STATISTICS],
            "got 4 updates, too few to remove the masks",
        ),
    ],
)
def test_with_too_few_devices_they_are_repeated_and_the_run_goes_on_without(
    vit: Built, tmp_path: Path, lost: dict[tuple[Stage, int], list[str]], stages: list[Stage], reason: str
) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, SEVEN))
    run.until(Stage.GLOBAL, lost)
    assert [c.round.stage for c in run.of(AnnounceRound)] == [*stages, Stage.GLOBAL]
    assert any(reason in c.text and "starts from the bundle's own head" in c.text for c in run.of(Log))
    assert not run.state.expert[: vit.bundle.expert.size(0)].any()


def test_the_repeat_of_a_sum_leaves_out_the_devices_that_did_not_answer(vit: Built, tmp_path: Path) -> None:
    """Seven devices whose keys are in a sum lose three, which are too many; the sum of the other four loses none."""
    run = SecureRun(vit, secure_devices(vit, tmp_path, SEVEN))
    run.until(Stage.GLOBAL, {(Stage.HOLDERS, 0): ["d0", "d1", "d2"]})
    counted = [Stage.KEYS, Stage.SHARES, Stage.HOLDERS]
    assert [c.round.stage for c in run.of(AnnounceRound)] == [
        *(*counted, *counted, Stage.UNMASK, Stage.STATISTICS, Stage.UNMASK, Stage.GLOBAL)
    ]
    assert run.state.expert.any()


def test_two_devices_start_without_sums(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 2))
    assert run.announced.stage is Stage.GLOBAL and run.announced.sums is Sums.NONE
    lacks = "stage 1 starts from the bundle's own head and the global expert keeps the head of stage 1"
    assert run.plan.config.lacks_sums == f"--devices 2: class sums need 3 devices; while there are fewer, {lacks}"
    run.until(Stage.PERSONAL)
    lines = [command.text for command in run.of(Log) if "no secure aggregation" in command.text]
    reason = "no secure aggregation: it needs 3 devices, and 2 can take part"
    assert lines == [
        f"{reason}; stage 1 starts from the bundle's own head",
        f"{reason}; the global expert keeps the head of stage 1",
    ]


def test_a_clip_bundle_without_sums_starts_zero_shot(clip: Built, tmp_path: Path) -> None:
    run = SecureRun(clip, secure_devices(clip, tmp_path, 2))
    zero_shot = clip.bundle.task.zero_shot
    assert zero_shot is not None and run.announced.stage is Stage.GLOBAL
    dims = clip.bundle.manifest.dims
    head = run.state.expert[: zero_shot.rows.size].reshape(len(clip.bundle.classes), dims.feature)
    cosines = (head * zero_shot.rows).sum(1) / np.linalg.norm(head, axis=1) / np.linalg.norm(zero_shot.rows, axis=1)
    assert np.allclose(cosines, 1, atol=1e-5)


def test_without_a_class_of_three_holders_there_are_no_sums(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 3), min_class_count=100)
    run.until(Stage.GLOBAL)
    assert any("no class has 100 samples on 3 or more devices" in command.text for command in run.of(Log))


@pytest.mark.parametrize(
    "lost",
    [
        {},
        {(Stage.GLOBAL, 0): ["d6"], (Stage.UNMASK, 5): ["d5"], (Stage.PERSONAL, 0): ["d4"]},
        {(Stage.GLOBAL, 1): ["d0", "d1"]},  # of the four at level 2
    ],
)
def test_the_updates_of_both_stages_are_aggregated_as_without_masks(
    vit: Built, tmp_path: Path, lost: dict[tuple[Stage, int], list[str]]
) -> None:
    config = {"secure": True, "stage1_rounds": 3, "stage1_sal": Sal(FixedSchedule(2), max_level=2)}
    caps = (2, 2, 2, 2)
    run = SecureRun(vit, secure_devices(vit, tmp_path / "masked", SEVEN, level_caps=caps), **config)
    if (Stage.GLOBAL, 1) in lost:
        run.until(Stage.GLOBAL)
        run.state = replace(run.state, sal=replace(run.state.sal, level=2))
        run.step()
        rounds = []
        while len(rounds) < 4:
            rounds.append(run.announced)
            run.step(lost.get((run.announced.stage, run.announced.index), ()))
        assert run.announced.stage is Stage.KEYS  # again, because two devices at level 2 are too few
        return
    run.until(Stage.EVALUATE, lost)
    plain = SecureRun(vit, secure_devices(vit, tmp_path / "plain", SEVEN, level_caps=caps), masks=False, **config)
    unmasked = {(Stage.GLOBAL, 2): lost[Stage.UNMASK, 5]} if lost else {}  # the next sum leaves that one out
    plain.until(Stage.EVALUATE, {**lost, **unmasked})
    levels = [c.round.level for c in run.of(AnnounceRound) if c.round.stage is Stage.GLOBAL]
    assert levels == [1, 1, 2]
    assert np.array_equal(run.state.expert, plain.state.expert) and np.array_equal(run.state.gate, plain.state.gate)
    assert run.state.gate.any() and run.state.sal == plain.state.sal
    for command in run.of(StoreRound):
        assert all(not update.metrics and not update.samples for update in command.closed.updates.values())


def test_a_level_that_fewer_than_three_devices_train_is_not_trained(vit: Built, tmp_path: Path) -> None:
    config = {"secure": True, "stage1_rounds": 3, "stage1_sal": Sal(AllAtOnce(), max_level=2)}
    run = SecureRun(vit, secure_devices(vit, tmp_path, 5, level_caps=(2, 2)), **config)
    run.until(Stage.GLOBAL)
    assert run.announced.level == 1


@pytest.mark.parametrize("silent_in", [Stage.KEYS, Stage.SHARES, Stage.GLOBAL])
def test_a_silent_device_of_three_at_a_level_does_not_stop_the_run(
    vit: Built, tmp_path: Path, silent_in: Stage
) -> None:
    """Before the vectors are masked, the two others join the level below. Afterwards the round is repeated, in the end
    at a lower level."""
    config = {"secure": True, "secure_sums": False, "stage1_rounds": 1, "stage1_sal": Sal(AllAtOnce(), max_level=2)}
    run = SecureRun(vit, secure_devices(vit, tmp_path, 5, level_caps=(2, 2, 2)), **config)
    run.until(Stage.KEYS)
    assert run.announced.level == 2
    levels = []
    while run.announced.stage is not Stage.PERSONAL:
        if run.announced.stage is Stage.GLOBAL:
            levels.append(run.announced.level)
        run.step(["d0"] if run.announced.stage is silent_in and len(levels) < 9 else [])
    if silent_in is Stage.GLOBAL:
        assert levels == [2, 1]  # the next sums leave it out, so it costs one deadline
        text = "updates of fewer than 3 devices at level 2 or above; repeating it at level 1"
    else:
        assert levels == [1]
        text = "this round trains at level 1: fewer than 3 devices answer at a higher one"
    assert any(text in command.text and command.warning for command in run.of(Log))


def test_a_device_that_does_not_answer_after_its_keys_costs_one_deadline_only(vit: Built, tmp_path: Path) -> None:
    """It is asked again when the sums that leave it out are over."""
    run = SecureRun(vit, secure_devices(vit, tmp_path, 5), secure=True, secure_sums=False, stage1_rounds=12)
    run.until(Stage.KEYS)
    for times in range(12):
        while run.announced.stage is not Stage.GLOBAL:
            run.step()
        assert ("d0" in run.announced.chosen) == (times in (0, 1 + LEFT_OUT_SUMS))
        opened = run.now
        run.step(["d0"])
        assert (run.now > opened) == (times in (0, 1 + LEFT_OUT_SUMS))


def test_a_device_at_work_and_one_of_three_are_not_left_out_of_sums(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 3), secure=True, secure_sums=False)
    run.until(Stage.GLOBAL)
    run.now += 1000
    run.feed_only(ClockTicked(frozenset(run.devices)))
    assert run.announced.stage is Stage.GLOBAL and not run.state.silent
    run.now += 1000
    run.feed()
    assert run.announced.stage is Stage.KEYS and run.state.expected == run.state.silent.keys() == set(run.devices)


def test_weighted_sums_are_the_means_of_each_part() -> None:
    parts = {"head": slice(0, 2), "0": slice(2, 5)}
    rng = np.random.default_rng(0)
    updates = [(rng.normal(size=size).astype(np.float32), weight) for size, weight in ((5, 3), (2, 9), (5, 1))]
    total = sum(
        (fixed_point(weighted_update(delta, weight, 0.25, parts), FRACTION_BITS) for delta, weight in updates),
        np.zeros(weighted_values(parts), np.uint64),
    )
    mean, accuracy = weighted_mean(numbers(total, FRACTION_BITS), parts)
    contributions = [Contribution.of(delta, weight) for delta, weight in updates]
    expected = WeightedMean().aggregate(contributions, parts)
    assert np.allclose(mean.delta, expected.delta, atol=1e-8) and accuracy == 0.25
    assert mean.trained == (slice(0, 2), slice(2, 5))


def test_with_noise_on_the_devices_the_server_sees_the_noisy_sum_only(vit: Built, tmp_path: Path) -> None:
    """Also the block that only three of seven devices train has the noise of all."""
    privacy, rule = Privacy(clip=0.5, noise_multiplier=0.8, shares=SEVEN), Sal(AllAtOnce(), max_level=2)
    config: dict[str, Any] = {"secure": True, "stage1_sal": rule, "stage2_sal": rule, "min_updates": SEVEN}
    config |= {"head": Head.CLASS_MEANS, "privacy": privacy, "min_holders": 1}
    caps = (2, 2, 2)
    run = SecureRun(vit, secure_devices(vit, tmp_path / "masked", SEVEN, level_caps=caps), **config)
    run.until(Stage.GLOBAL)
    before = run.state.expert.copy()
    assert np.isfinite(before).all() and before.any()
    run.until(Stage.EVALUATE)
    layout = vit.bundle.expert
    for level, trained in ((1, SEVEN), (2, 3)):
        block = slice(layout.size(level - 1) if level > 1 else 0, layout.size(level))
        change = run.state.expert[block].astype(np.float64) - before[block]
        assert np.std(change) == pytest.approx(0.8 * 0.5 / trained, rel=0.2)  # the clipped updates are small beside it
    assert run.state.gate.any()
    assert {c.closed.round.stage for c in run.of(StoreRound)} == {
        *EXCHANGE,
        Stage.STATISTICS,
        Stage.GLOBAL,
        Stage.PERSONAL,
    }
    for command in run.of(StoreRound):
        assert all(not update.metrics and not update.samples for update in command.closed.updates.values())


def test_a_device_helps_with_no_sum_that_has_not_the_whole_noise(vit: Built, tmp_path: Path) -> None:
    privacy, rule = Privacy(clip=0.5, noise_multiplier=0.8, shares=6), Sal(AllAtOnce(), max_level=1)
    config: dict[str, Any] = {
        "secure": True,
        "stage1_sal": rule,
        "stage2_sal": rule,
        "min_updates": 6,
        "min_holders": 1,
    }
    run = SecureRun(vit, secure_devices(vit, tmp_path, SEVEN), privacy=privacy, **config)
    run.until(Stage.GLOBAL)
    run.step(without=["d5", "d6"])  # five could remove the masks
    assert run.announced.stage is Stage.KEYS and "fewer than 6" in run.of(Log)[-1].text
    run.until(Stage.GLOBAL)
    with pytest.raises(RunError, match="the noise is whole from 8 devices on, and the sum is of 7"):
        more = replace(privacy, shares=8)
        run.devices["d0"].answer(run.announced.model_copy(update={"privacy": more}))
    run.until(Stage.UNMASK)
    round_ = run.announced
    published(run, "d0", round_)
    with pytest.raises(RunError, match="the noise is whole from 6 devices on, and the sum is of 5"):
        run.devices["d0"].answer(round_.model_copy(update={"chosen": round_.chosen[:5]}))
    assert run.devices["d0"].answer(round_)


def published(run: SecureRun, device: str, round_: Round) -> None:
    for command in run.of(PublishGlobals):
        run.devices[device].store.globals.write(command.blob)


def test_a_device_opens_a_vector_for_one_set_of_survivors_only(vit: Built, tmp_path: Path) -> None:
    """Not even with a restart in between: both kinds of shares of one device would reveal its vector."""
    run = SecureRun(vit, secure_devices(vit, tmp_path, SEVEN))
    run.until(Stage.UNMASK)
    round_, device = run.announced, run.devices["d0"]
    published(run, "d0", round_)
    first = device.answer(round_)["opened"]
    assert np.array_equal(device.answer(round_)["opened"], first)
    fewer = round_.model_copy(update={"round": round_.round + 1, "chosen": round_.chosen[:-1]})
    with pytest.raises(RunError, match=r"refused to the server in round 5 \(unmask\): .* together reveal a vector"):
        device.answer(fewer)


def test_a_device_without_its_keys_waits_for_the_next_ones(vit: Built, tmp_path: Path) -> None:
    """A second process of its name with an empty state directory, for example."""
    run = SecureRun(vit, secure_devices(vit, tmp_path, 4))
    run.until(Stage.SHARES)
    new = replace(run.devices["d0"], folder=tmp_path / "new")
    with pytest.raises(NoKeysError, match=r"round 2 \(shares\) needs the keys of an earlier round, .*/new"):
        new.answer(run.announced)


def test_a_device_masks_a_vector_once_and_does_not_join_a_second_sum_of_the_same(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, SEVEN))
    run.until(Stage.HOLDERS)
    round_, device = run.announced, run.devices["d0"]
    published(run, "d0", round_)
    first = device.answer(round_)["sums"]
    assert np.array_equal(device.answer(round_)["sums"], first)
    for change in ({"chosen": round_.chosen[:-1]}, {"round": 9}):
        with pytest.raises(RunError, match="the same vector with other masks"):
            device.answer(round_.model_copy(update=change))
    for change, error in (({"chosen": ("d0", "d1")}, "too few"), ({"chosen": ("d0", "d1", "x")}, "not in the roster")):
        with pytest.raises(RunError, match=error):
            device.answer(round_.model_copy(update=change))
    run.until(Stage.GLOBAL)
    for number, stage in enumerate((Stage.KEYS, Stage.SHARES), start=100):  # a server that starts them again
        asked = round_.model_copy(update={"round": number, "stage": stage})
        if stage is Stage.SHARES:
            break
        device.answer(asked)
    with pytest.raises(RunError, match="two sums over different devices"):
        device.answer(round_.model_copy(update={"round": 102}))


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, authority, identities = tmp_path_factory.mktemp("identities"), make_authority("test"), {}
    for name in ("d0", "d1", "d2", "d3"):
        issued = authority.issue(name, [CLIENT])
        identities[name] = folder / f"{name}.pem"
        identities[name].write_text(issued.key_pem + issued.certificate_pem + authority.certificate_pem)
        identities[name].chmod(0o600)
    return identities


def test_keys_are_signed_and_a_forged_roster_is_refused(
    vit: Built, tmp_path: Path, identities: dict[str, Path]
) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 4, identities))
    run.until(Stage.HOLDERS)  # every device has accepted the roster
    run = SecureRun(vit, secure_devices(vit, tmp_path / "forged", 4, identities))
    run.until(Stage.SHARES)
    device, (command,) = run.devices["d0"], run.of(PublishGlobals)
    header, tensors = unpack(command.blob, Globals)

    def answer(**changes: np.ndarray) -> None:
        blob = pack(header, {**tensors, **changes})
        device.store.globals.write(blob)
        device.answer(run.announced.model_copy(update={"roster": blob_hash(blob)}))

    keys = tensors["keys"].copy()
    keys[1] = keys[2]
    for changes, error in (
        ({"keys": keys}, "the signature of d1 is not valid"),
        ({"level": tensors["level"] + np.uint64(1)}, "the signature of d0 is not valid"),
        ({"name": np.frombuffer(b"d0d1d2dX", np.uint8)}, "the signature of dX is not valid: its certificate is of"),
        ({"name": np.frombuffer(b"d0d1d2d2", np.uint8)}, "a device twice"),
        ({"certificate_ends": tensors["certificate_ends"][::-1].copy()}, "do not end"),
    ):
        with pytest.raises(RunError, match=error):
            answer(**changes)
    few = {name: tensor[:2] for name, tensor in tensors.items() if name in ("keys", "level") or "_ends" in name}
    for column in ("name", "certificate", "signature"):
        few[column] = tensors[column][: int(few[f"{column}_ends"][-1])]
    with pytest.raises(RunError, match="2 devices are fewer than 3"):
        answer(**few)
    answer()
    other = SecureRun(vit, [*secure_devices(vit, tmp_path / "other", 4)])
    other.until(Stage.SHARES)
    with pytest.raises(RunError, match="the signature of d0 is not valid"):  # without certificates
        published(other, "d0", other.announced)
        device.store.globals.write(other.of(PublishGlobals)[0].blob)
        device.answer(run.announced.model_copy(update={"roster": other.announced.roster}))


def test_a_round_of_training_with_too_few_devices_is_repeated_at_its_deadline_only(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 3), secure=True, secure_sums=False)
    run.until(Stage.GLOBAL)
    run.feed(StatusSeen(run.status("d2", online=False)))
    run.now += 1000
    run.feed()
    for _ in range(2):
        keys, opened = run.announced, run.now
        assert keys.stage is Stage.KEYS
        run.step(without=["d2"])
        assert run.announced.round == keys.round + 1 and run.now > opened  # `step` had to pass the deadline


@pytest.mark.parametrize(("required", "stage"), [(Secure.SUMS, Stage.HEAD), (Secure.ALL, Stage.GLOBAL)])
def test_a_device_may_require_secure_aggregation(
    vit: Built, photos: Path, tmp_path: Path, required: Secure, stage: Stage
) -> None:
    daemon = make_daemon(vit, photos, tmp_path)
    device, folder = daemon.device, SampleFolder(photos, vit.bundle, daemon.device.store)
    control = daemon.runner.control
    runner = RoundRunner(device, folder, control, daemon.runner.tracker, no_report, secure=required)
    with pytest.raises(RunError, match=f"--secure {required.value}: the server asks .* without secure aggregation"):
        runner.run(announced_round(stage, level=1), bytes_down=0)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
def test_a_device_that_is_killed_at_each_of_its_writes_is_in_the_same_sum(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """The next process answers again. The answer that counts is the one that reaches the outbox, the only one sent."""
    run = SecureRun(vit, secure_devices(vit, tmp_path / "masked", 3), secure=True)
    answer, write = SecureDevice.answer, SecureStore.write
    killed: list[Stage] = []

    def fail(store: SecureStore, record: SecureRecord) -> None:
        if after:
            write(store, record)
        raise Killed

    def interrupted(device: SecureDevice, round_: Round, masks: bool = True) -> Tensors:
        if device.name == "d1":
            with monkeypatch.context() as patch, contextlib.suppress(Killed):
                patch.setattr(SecureStore, "write", fail)
                answer(device, round_, masks)
                raise AssertionError(f"no write in {round_.stage.value}")
            killed.append(round_.stage)
        return answer(device, round_, masks)

    monkeypatch.setattr(SecureDevice, "answer", interrupted)
    run.until(Stage.EVALUATE)
    assert {*killed} == {*EXCHANGE, Stage.HOLDERS, Stage.STATISTICS, Stage.GLOBAL, Stage.HEAD, Stage.PERSONAL}
    monkeypatch.undo()
    plain = SecureRun(vit, secure_devices(vit, tmp_path / "plain", 3), masks=False, secure=True)
    plain.until(Stage.EVALUATE)
    assert np.array_equal(run.state.expert, plain.state.expert) and np.array_equal(run.state.gate, plain.state.gate)


def test_updates_that_do_not_fit_the_round_are_refused(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 3))
    wrong = {
        Stage.KEYS: ({"keys": np.zeros((3, 32), np.uint8)}, "are not signed keys"),
        Stage.SHARES: ({"shares": np.zeros((2, SHARE_BYTES), np.uint8)}, "expected uint8[3, 92]"),
        Stage.HOLDERS: ({"sums": np.zeros(4, np.float32)}, "expected uint64[8]"),
        Stage.UNMASK: ({"opened": np.zeros((4, 16), np.uint8)}, "expected uint8[3, 16]"),
        Stage.STATISTICS: ({"sums": np.zeros(7, np.uint64)}, "is uint64[7]"),
    }
    for stage, (tensors, error) in wrong.items():
        run.until(stage)
        (reply, *_) = run.feed(make_update(run.plan, run.announced, "d0", tensors=tensors))
        assert reply.ack.verdict is Verdict.REJECTED and error in reply.ack.reason


def test_a_public_key_that_no_device_could_use_is_refused(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 3))
    tensors = SignedKeys(np.zeros((1 + VECTORS, KEY_BYTES), np.uint8)).tensors()
    (reply, *_) = run.feed(make_update(run.plan, run.announced, "d0", tensors=tensors))
    assert reply.ack.verdict is Verdict.REJECTED and reply.ack.reason == "a public key is invalid"


def test_damaged_shares_of_one_device_end_the_sums_and_no_other_device(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, answer = SecureRun(vit, secure_devices(vit, tmp_path, 4)), SecureDevice.answer

    def hostile(device: SecureDevice, round_: Round, masks: bool = True) -> Tensors:
        tensors = answer(device, round_, masks)
        is_damaged = device.name == "d1" and round_.stage is Stage.SHARES
        return {"shares": np.zeros_like(tensors["shares"])} if is_damaged else tensors

    monkeypatch.setattr(SecureDevice, "answer", hostile)
    run.until(Stage.GLOBAL)
    assert any("no secure aggregation: 0 shares of d1, fewer than 3" in command.text for command in run.of(Log))


def answers(run: SecureRun, accuracies: dict[str, float]) -> None:
    """These devices answer the present round, and report an accuracy if it is above zero."""
    round_, blobs = run.announced, {command.sha256: command.blob for command in run.of(PublishGlobals)}
    for name, accuracy in accuracies.items():
        run.devices[name].store.globals.write(blobs[round_.roster])
        hidden = {"samples": 0, "metrics": {"held_out_global": accuracy, "global_nll": 9.0} if accuracy else {}}
        run.feed(make_update(run.plan, round_, name, tensors=run.devices[name].answer(round_), **hidden))


def test_a_share_of_the_devices_closes_no_round_whose_masks_they_cannot_remove(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, SEVEN), secure=True, enough=0.5)
    run.until(Stage.GLOBAL)
    answers(run, dict.fromkeys(("d0", "d1", "d2", "d3"), 0.0))
    assert run.announced.stage is Stage.GLOBAL and not run.state.repeats
    answers(run, {"d4": 0.0})
    assert run.announced.stage is Stage.UNMASK and len(run.announced.chosen) == 5


def test_likelihoods_that_a_hostile_device_reports_do_not_drop_the_head(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 3), secure=True)
    run.until(Stage.PERSONAL)
    run.state = replace(run.state, former=replace(run.state.former, nlls={"d0": 0.1}))
    assert run.state.former.head.size
    answers(run, {"d0": 0.01, "d1": 0.0, "d2": 0.0})
    assert run.announced.stage is Stage.UNMASK


def test_a_server_with_a_certificate_accepts_signed_keys_only(vit: Built, tmp_path: Path) -> None:
    run = SecureRun(vit, secure_devices(vit, tmp_path, 3))

    def check(name: str, signed: SignedKeys, message: bytes) -> None:
        raise MessageError(f"the signature of {name} is not valid")

    run.plan = replace(run.plan, check_keys=check)
    commands = run.step()
    assert [command.ack.reason for command in commands if isinstance(command, SendAck)] == [
        f"the signature of d{number} is not valid" for number in range(3)
    ]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"aggregation": Aggregation(rule=Rule.MEDIAN)}, "leave out --rule median"),
        ({"aggregation": Aggregation(rule=Rule.MEAN, clip=1.0), "max_staleness": 2}, "leave out --clip, --max-stal"),
        ({"encoding": Encoding.INT8}, "leave out --encoding int8"),
        ({"devices": 2}, "--secure needs at least 3 devices, not --devices 2"),
    ],
)
def test_secure_excludes_what_needs_single_updates(vit: Built, change: dict[str, Any], error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        plan_for(vit, **{"secure": True, "devices": 3, **change})
