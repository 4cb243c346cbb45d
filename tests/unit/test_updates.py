"""From the result of a stage to the client update: privacy, error feedback, encoding and the residual's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.bundles import LAYERS, Built

from edge_runtime.training.stages import StageResult
from edge_runtime.training.updates import encode_with_feedback, prepare_update
from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.algorithms.fixed_point import numbers
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.algorithms.weighted_sums import trained_values
from fedfmsl.errors import MessageError
from fedfmsl.protocol.encoding import SCALES, decode, encode
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Encoding, Round, Stage, Training

LAYOUT = Layout.build([("head", "w", (2, 5)), ("1", "a", (6,)), ("0", "b", (4,))])
COARSE = (Encoding.FP16, Encoding.INT8)
SAL = Sal(CapabilityQueue(2, 0.1), max_level=LAYERS)
PRIVACY = Privacy(clip=1.0, noise_multiplier=1e-7, shares=1)
Floats = NDArray[np.float32]


def round_of(index: int = 0, stage: Stage = Stage.GLOBAL, encoding: Encoding = Encoding.INT8, **change: Any) -> Round:
    fields: dict[str, Any] = {"run": "r", "session": "s", "round": index + 1, "of": 9, "level": 1}
    training = Training(epochs=1, learning_rate=1.0)
    return Round(**{**fields, **change}, index=index, stage=stage, encoding=encoding, training=training, sal=SAL)


def deltas(vit: Built, count: int, level: int = 1) -> list[Floats]:
    rng, size = np.random.default_rng(0), vit.bundle.expert.size(level)
    return [rng.normal(scale=0.01, size=size).astype(np.float32) for _ in range(count)]


def sent(vit: Built, path: Path, round_: Round, delta: Floats) -> Tensors:
    return prepare_update(vit.bundle, path, round_, StageResult(delta=delta), np.random.default_rng(0)).tensors


def equal(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


# error feedback


@settings(max_examples=50)
@given(st.sampled_from(COARSE), st.integers(1, 40), st.integers(0, 99))
def test_over_all_rounds_the_sum_differs_by_one_rounding_at_most(encoding: Encoding, rounds: int, seed: int) -> None:
    rng, residual = np.random.default_rng(seed), np.empty(0, np.float32)
    trained, received, slack = np.zeros(20), np.zeros(20), np.zeros(20)
    for number in range(rounds):
        delta = rng.normal(scale=10.0 ** rng.integers(-4, 2), size=20 if number > rounds // 2 else 10)
        delta = delta.astype(np.float32)
        tensors, residual = encode_with_feedback(LAYOUT, delta, residual, encoding)
        trained[: delta.size] += delta
        slack[: delta.size] += np.abs(delta) * 2.0**-22  # of sums in float32
        received[: delta.size] += decode(LAYOUT, tensors, encoding)
        assert residual.dtype == np.float32
    if encoding is Encoding.INT8:
        scales = np.asarray(tensors[SCALES], np.float64)
        slots = LAYOUT.slots[: scales.size]
        step = np.concatenate([np.full(slot.end - slot.offset, s) for slot, s in zip(slots, scales, strict=True)])
    else:
        step = np.abs(np.concatenate([t.ravel() for t in tensors.values()])).astype(np.float64) * 2.0**-10 + 2.0**-24
    assert (np.abs(trained - received)[: step.size] <= step / 2 + slack[: step.size]).all()


def test_feedback_keeps_small_updates_beside_a_large_one() -> None:
    delta = np.full(20, 0.001, np.float32)
    delta[[0, 10, 16]] = 1.0
    residual, received, without = np.empty(0, np.float32), np.zeros(20), np.zeros(20)
    for _ in range(100):
        tensors, residual = encode_with_feedback(LAYOUT, delta, residual, Encoding.INT8)
        received += decode(LAYOUT, tensors, Encoding.INT8)
        without += decode(LAYOUT, encode(LAYOUT, delta, Encoding.INT8), Encoding.INT8)
    assert received[1] == pytest.approx(0.1, abs=1 / 127)
    assert without[1] == 0


def test_an_update_that_is_not_finite_leaves_the_residual_unchanged() -> None:
    residual = np.full(20, 1e-3, np.float32)
    for encoding in COARSE:
        tensors, after = encode_with_feedback(LAYOUT, np.full(20, np.nan, np.float32), residual, encoding)
        assert np.array_equal(after, residual)
        with pytest.raises(MessageError):
            decode(LAYOUT, tensors, encoding)


@pytest.mark.parametrize("encoding", COARSE)
def test_a_residual_is_added_once_to_the_next_round(vit: Built, tmp_path: Path, encoding: Encoding) -> None:
    layout, (one, two) = vit.bundle.expert, deltas(vit, 2)
    path = tmp_path / "residual"
    first = sent(vit, path, round_of(0, encoding=encoding), one)
    second = sent(vit, path, round_of(1, encoding=encoding), two)
    lost = one - decode(layout, first, encoding)
    assert lost.any()
    assert equal(second, encode(layout, two + lost, encoding))


def test_a_repeated_round_uses_the_same_residual(vit: Built, tmp_path: Path) -> None:
    """For example after a crash before the update was in the outbox, or if too few devices answered."""
    one, two, three = deltas(vit, 3)
    undisturbed, path = tmp_path / "undisturbed", tmp_path / "residual"
    expected = [sent(vit, undisturbed, round_of(index), delta) for index, delta in enumerate((one, two, three))]
    sent(vit, path, round_of(0), one)
    for _ in range(3):
        assert equal(sent(vit, path, round_of(1), two), expected[1])
    assert equal(sent(vit, path, round_of(2), three), expected[2])
    assert path.read_bytes() == undisturbed.read_bytes()


def test_a_residual_of_a_lower_level_is_zero_for_the_new_blocks(vit: Built, tmp_path: Path) -> None:
    layout, path = vit.bundle.expert, tmp_path / "residual"
    (low,), (high,) = deltas(vit, 1, level=1), deltas(vit, 1, level=2)
    lost = low - decode(layout, sent(vit, path, round_of(0), low), Encoding.INT8)
    expected = high.copy()
    expected[: low.size] += lost
    assert equal(sent(vit, path, round_of(1), high), encode(layout, expected, Encoding.INT8))


@pytest.mark.parametrize("later", [round_of(1, session="another"), round_of(1, stage=Stage.PERSONAL)])
def test_a_residual_of_another_session_or_stage_is_ignored(vit: Built, tmp_path: Path, later: Round) -> None:
    path, layout = tmp_path / "residual", vit.bundle.gate if later.stage is Stage.PERSONAL else vit.bundle.expert
    sent(vit, path, round_of(0), deltas(vit, 1)[0])
    delta = np.random.default_rng(1).normal(size=layout.size(0)).astype(np.float32)
    assert equal(sent(vit, path, later, delta), encode(layout, delta, Encoding.INT8))


def test_a_damaged_or_infinite_residual_is_ignored(vit: Built, tmp_path: Path) -> None:
    path, (one, two) = tmp_path / "residual", deltas(vit, 2)
    expected = encode(vit.bundle.expert, two, Encoding.INT8)
    sent(vit, path, round_of(0), one)
    whole = path.read_bytes()
    not_finite = whole[:-4] + np.float32(np.nan).tobytes()
    for bad in (b"", b"nonsense", whole[:100], whole[:-1], not_finite):
        path.write_bytes(bad)
        assert equal(sent(vit, path, round_of(1), two), expected)


def test_fp32_is_sent_exactly_and_leaves_no_residual(vit: Built, tmp_path: Path) -> None:
    (delta,) = deltas(vit, 1)
    tensors = sent(vit, tmp_path / "residual", round_of(encoding=Encoding.FP32), delta)
    assert vit.bundle.expert.join(tensors).tobytes() == delta.tobytes()
    assert not (tmp_path / "residual").exists()


def test_preparing_an_update_does_not_change_the_delta(vit: Built, tmp_path: Path) -> None:
    one, two = deltas(vit, 2)
    copy = two.copy()
    for index, delta in enumerate((one, two)):
        sent(vit, tmp_path / "residual", round_of(index, privacy=PRIVACY), delta)
    assert np.array_equal(two, copy)


# privacy

RESULT = StageResult(samples=37, level=2, metrics={"held_out_global": 0.9}, counts={"test": [1, 2]})


@pytest.mark.parametrize("stage", [Stage.STATISTICS, Stage.GLOBAL, Stage.PERSONAL])
def test_a_private_update_has_no_facts_about_samples_except_its_tensors(
    vit: Built, tmp_path: Path, stage: Stage
) -> None:
    dims, gate = vit.bundle.manifest.dims, vit.bundle.gate.total
    statistics = {
        "class_sums": np.ones((len(vit.bundle.classes), dims.feature), np.float32),
        "class_counts": np.full(len(vit.bundle.classes), 9.0, np.float32),
        "norm_sum": np.full(1, 50.0, np.float32),
    }
    own: dict[Stage, dict[str, Any]] = {
        Stage.STATISTICS: {"tensors": statistics},
        Stage.GLOBAL: {"delta": 50 * np.ones(vit.bundle.expert.size(1), np.float32)},
        Stage.PERSONAL: {"delta": 50 * np.ones(gate, np.float32)},
    }
    result = StageResult(samples=37, level=2, metrics={"held_out": 0.9}, counts={"test": [1, 2]}, **own[stage])
    announced = round_of(stage=stage, encoding=Encoding.FP32, privacy=PRIVACY)
    update = prepare_update(vit.bundle, tmp_path / "residual", announced, result, np.random.default_rng(0))
    assert (update.samples, dict(update.metrics), dict(update.counts)) == (1, {}, {})
    if stage is Stage.STATISTICS:
        assert np.allclose(np.asarray(update.tensors["class_counts"], np.float32), 1 / len(vit.bundle.classes))
    else:
        norm = np.linalg.norm(np.concatenate([t.ravel() for t in update.tensors.values()]))
        assert norm == pytest.approx(PRIVACY.clip, rel=1e-3)
    if stage is Stage.PERSONAL:
        assert update.level == announced.level  # the local expert's level would depend on accuracies


@pytest.mark.parametrize("stage", [Stage.EVALUATE, Stage.BASELINE])
def test_an_evaluation_is_sent_unchanged(vit: Built, tmp_path: Path, stage: Stage) -> None:
    announced = round_of(stage=stage, privacy=PRIVACY)
    assert prepare_update(vit.bundle, tmp_path / "residual", announced, RESULT, np.random.default_rng(0)) == RESULT


@pytest.mark.parametrize("stage", [Stage.STATISTICS, Stage.GLOBAL, Stage.PERSONAL])
def test_a_secure_update_is_clipped_and_noised_in_fixed_point_numbers(vit: Built, tmp_path: Path, stage: Stage) -> None:
    dims, layout = vit.bundle.manifest.dims, vit.bundle.gate if stage is Stage.PERSONAL else vit.bundle.expert
    statistics = {
        "class_sums": np.ones((len(vit.bundle.classes), dims.feature), np.float32),
        "class_counts": np.full(len(vit.bundle.classes), 9.0, np.float32),
        "norm_sum": np.full(1, 50.0, np.float32),
    }
    size = layout.size(1) if stage is Stage.GLOBAL else layout.total
    own = {"tensors": statistics} if stage is Stage.STATISTICS else {"delta": 50 * np.ones(size, np.float32)}
    result = StageResult(samples=37, level=1, metrics={"held_out_global": 0.9}, **own)  # type: ignore[arg-type]
    announced = round_of(stage=stage, encoding=Encoding.FP32, level=LAYERS, secure=True)

    def sent(noise: float) -> NDArray[np.float64]:
        round_ = announced.model_copy(update={"privacy": Privacy(clip=1.0, noise_multiplier=noise, shares=4)})
        update = prepare_update(vit.bundle, tmp_path / "residual", round_, result, np.random.default_rng(0))
        assert (update.samples, dict(update.metrics)) == (0, {})
        bits = 20 if stage is Stage.STATISTICS else 30
        return numbers(np.asarray(update.tensors["sums"], np.uint64), bits)

    quiet, loud = sent(1e-3), sent(2.0) - sent(1e-3)
    if stage is Stage.STATISTICS:
        constant = slice(len(vit.bundle.classes) * dims.feature, -1)
        assert np.allclose(quiet[constant], 1 / len(vit.bundle.classes), atol=1e-5) and not loud[constant].any()
        return
    values = trained_values(layout.parts_of(LAYERS) if stage is Stage.GLOBAL else layout.parts)
    assert np.linalg.norm(quiet[:size]) == pytest.approx(1.0, rel=0.05)
    assert not loud[values:].any() and set(quiet[values:]) <= {0.0, 1.0}  # weights, and no accuracy
    assert np.std(loud[:size]) == pytest.approx(1.0, rel=0.1)
    if stage is Stage.GLOBAL:  # also of blocks that the device does not train
        assert np.std(loud[size:values]) == pytest.approx(1.0, rel=0.1)


def test_noise_is_added_before_the_update_is_encoded(vit: Built, tmp_path: Path) -> None:
    loud = Privacy(clip=1.0, noise_multiplier=1.0, shares=1)
    (delta,) = deltas(vit, 1)
    tensors = sent(vit, tmp_path / "residual", round_of(privacy=loud), delta)
    values = decode(vit.bundle.expert, tensors, Encoding.INT8)
    assert values.std() == pytest.approx(1.0, rel=0.2)
    assert np.abs(values - np.round(values / values.max())).any()
