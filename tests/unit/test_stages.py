"""What a real device sends after each stage: real photos, ONNX Runtime and files."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import Built

import edge_runtime.data.features as features
from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.folder import SampleFolder, scan_once
from edge_runtime.data.inputs import reader_of
from edge_runtime.data.samples import Splits, labels_of
from edge_runtime.engines.base import Batch
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.gate import Gate
from edge_runtime.training.local_expert import LocalExpert, compute_mixture, train_personal
from edge_runtime.training.stages import Globals, statistics, train_class_sums, train_global
from edge_runtime.training.updates import prepare_update
from fedfmsl.algorithms.arrays import Tensors, Vector
from fedfmsl.algorithms.class_means import class_mean_head
from fedfmsl.algorithms.mixture import label_log_p
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import AllAtOnce, CapabilityQueue, Sal
from fedfmsl.protocol.encoding import decode
from fedfmsl.protocol.messages import Encoding, Round, Stage, Training

TRAINING = Training(epochs=2, learning_rate=1e-2)
SAL = Sal(CapabilityQueue(2, 0.1), max_level=2)


@pytest.fixture
def device(vit: Built, photos: Path, tmp_path: Path) -> TrainingContext:
    store = DeviceStore(tmp_path)
    engine = StepGraphEngine(vit.bundle, threads=1)
    return TrainingContext(
        device_name="d",
        bundle=vit.bundle,
        scanned=scan_once(photos, vit.bundle.manifest.classes, reader_of(vit.bundle).kind),
        cache=FeatureCache(DiskCache(store.cache), vit.bundle, threads=1),
        engine=engine,
        gate=Gate(vit.bundle, threads=1),
        store=store,
        level_cap=1,
        report=lambda *_: None,
    )


def task(stage: Stage, level: int = 1, **change: Any) -> Round:
    fields: dict[str, Any] = {"run": "r", "session": "s", "round": 3, "index": 0, "of": 2, **change}
    return Round(**fields, stage=stage, level=level, training=TRAINING, sal=SAL)


def given(device: TrainingContext, level: int) -> Globals:
    expert, gate = device.bundle.initial()
    return Globals(expert[: device.bundle.expert.size(level)], expert[: device.bundle.expert.size(1)], gate)


def head(sums: Tensors) -> Vector:
    named = {name: np.asarray(tensor, np.float32) for name, tensor in sums.items()}
    return class_mean_head(named["class_sums"], named["class_counts"], float(named["norm_sum"][0]))


def test_stage_1_gives_what_it_moved_at_the_level_the_device_can_bear(device: TrainingContext) -> None:
    globals_ = given(device, level=2)
    before = globals_.expert.copy()
    outcome = train_global(device, task(Stage.GLOBAL, level=2), globals_)
    size = device.bundle.expert.size(1)
    assert outcome.level == 1
    assert outcome.delta is not None
    assert outcome.delta.shape == (size,)
    assert outcome.delta.any()
    assert np.array_equal(globals_.expert, before)
    assert np.array_equal(outcome.delta, device.engine.get() - before[:size])


def test_stage_2_gives_what_the_gate_moved(device: TrainingContext) -> None:
    globals_ = given(device, level=1)
    before = globals_.gate.copy()
    outcome = train_personal(device, task(Stage.PERSONAL), globals_)
    assert outcome.delta is not None
    assert outcome.delta.shape == (device.bundle.gate.total,)
    assert 0 < np.abs(outcome.delta).max() < 0.1  # a few steps of a small rate
    assert np.array_equal(globals_.gate, before)


class Losses(StepGraphEngine):
    """Notes what each step's loss was."""

    def step(self, batch: Batch) -> float:
        self.seen = [*getattr(self, "seen", []), super().step(batch)]
        return self.seen[-1]


def stage_2(device: TrainingContext, level_cap: int, index: int) -> tuple[LocalExpert, list[float], set[str]]:
    """The local expert after a round of plain LoRA, each step's loss, and the folders of features made on the way."""
    everything = replace(SAL, trigger=AllAtOnce())
    engine = Losses(device.bundle, threads=1)
    before = {path.name for path in device.store.cache.iterdir()}
    round_ = task(Stage.PERSONAL, level=2, index=index).model_copy(update={"sal": everything})
    train_personal(replace(device, engine=engine, level_cap=level_cap), round_, given(device, level=2))
    expert = LocalExpert.load(device, "s")
    assert expert is not None
    return expert, engine.seen, {path.name for path in device.store.cache.iterdir()} - before


def test_a_local_expert_beyond_a_lowered_cap_is_trained_whole_but_only_above_it(device: TrainingContext) -> None:
    before, _, _ = stage_2(device, level_cap=2, index=0)
    kept = device.store.personal.read_bytes()
    _, wanted, made = stage_2(device, level_cap=2, index=1)
    assert not made
    device.store.personal.write_bytes(kept)
    after, losses, made = stage_2(device, level_cap=1, index=1)
    assert losses[0] == pytest.approx(wanted[0], rel=1e-3)  # the same model, but for states in fp16
    assert len(made) == 1 and "level-1-above-2-" in made.pop()
    above = device.bundle.expert.size(1)
    assert (after.theta[:above] != before.theta[:above]).mean() > 0.9
    assert np.array_equal(after.theta[above:], before.theta[above:])
    assert after.sal.level == 2  # where it is trained again once the cap has been raised
    assert after.best_nll <= before.best_nll


def test_a_local_expert_takes_the_features_of_the_global_one_below_its_level(device: TrainingContext) -> None:
    globals_ = given(device, level=2)
    hidden = device.hidden_states(device.splits.train, globals_.expert, 1)
    folders = {path.name for path in device.store.cache.iterdir()}
    train_personal(device, task(Stage.PERSONAL), globals_)
    assert hidden.folder in folders
    assert {path.name for path in device.store.cache.iterdir() if "-above-" in path.name} == {hidden.folder}


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("stage", [Stage.GLOBAL, Stage.PERSONAL])
def test_what_is_sent_is_what_was_trained_but_for_the_encoding(
    device: TrainingContext, stage: Stage, encoding: Encoding
) -> None:
    round_, globals_ = task(stage, encoding=encoding), given(device, level=1)
    work, layout = (
        (train_global, device.bundle.expert) if stage is Stage.GLOBAL else (train_personal, device.bundle.gate)
    )
    outcome = work(device, round_, globals_)
    assert outcome.delta is not None
    sent = prepare_update(device.bundle, device.store.residual, round_, outcome, np.random.default_rng(0))
    assert np.abs(decode(layout, sent.tensors, encoding) - outcome.delta).max() <= np.abs(outcome.delta).max() / 250


def test_private_statistics_of_real_features_give_nearly_the_same_head(device: TrainingContext) -> None:
    quiet = Privacy(clip=1.0, noise_multiplier=1e-6, shares=1)
    round_ = task(Stage.STATISTICS, privacy=quiet)
    outcome = statistics(device, round_, given(device, level=1))
    sent = prepare_update(device.bundle, device.store.residual, round_, outcome, np.random.default_rng(0))
    wanted = head(train_class_sums(device, 1))
    assert np.allclose(head(sent.tensors), wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.fixture
def watched(device: TrainingContext, photos: Path, tmp_path: Path) -> tuple[TrainingContext, SampleFolder]:
    """The device with a folder of its own, whose files nobody has been writing for long."""
    root = shutil.copytree(photos, tmp_path / "photos")
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    folder = SampleFolder(root, device.bundle, device.store)
    return replace(device, scanned=folder.scan()), folder


def contents(slices: Splits) -> list[list[str]]:
    return [[each.sha256 for each in part] for part in (slices.train, slices.held_out, slices.test)]


def test_slices_are_dealt_once_and_are_the_same_at_the_next_look(
    watched: tuple[TrainingContext, SampleFolder], device: TrainingContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, folder = watched
    assert contents(before.splits) == contents(device.splits)
    after = replace(before, scanned=folder.scan())
    monkeypatch.setattr(features, "open_session", lambda *_: pytest.fail("a graph is run to deal again"))
    assert after.splits == before.splits


def test_newcomers_are_trained_on_and_what_has_left_is_not(watched: tuple[TrainingContext, SampleFolder]) -> None:
    device, folder = watched
    round_ = task(Stage.STATISTICS)
    first = statistics(device, round_, given(device, level=1))
    left, like = [each for each in device.splits.train if each.label == 0][:2]
    for number in range(20):
        twin = like.path.with_name(f"new-{number}.jpg")
        twin.write_bytes(like.path.read_bytes() + bytes([number]))
        os.utime(twin, (1e9, 1e9))
    left.path.unlink()
    after = replace(device, scanned=folder.scan())
    second = statistics(after, round_, given(device, level=1))
    tested = sum(each.path.name.startswith("new-") for each in after.splits.test)
    assert 0 < tested < 10
    more = 20 - tested - 1
    assert second.samples == first.samples + more
    assert second.tensors["class_counts"][0] == first.tensors["class_counts"][0] + more
    assert after.class_counts[0] == device.class_counts[0] + more
    assert contents(after.splits)[1] == contents(device.splits)[1]  # each looks like what is trained on


def test_the_best_expert_is_measured_anew_when_the_held_out_slice_has_changed(
    watched: tuple[TrainingContext, SampleFolder],
) -> None:
    device, folder = watched
    globals_ = given(device, level=1)
    train_personal(device, task(Stage.PERSONAL), globals_)
    first = kept(device)
    unbeatable = replace(first, best_nll=-1e9)
    unbeatable.save(device, "s")
    train_personal(device, task(Stage.PERSONAL, index=1), globals_)
    assert kept(device).best_nll == -1e9
    for sample in device.splits.held_out[1:]:
        sample.path.unlink()
    after = replace(device, scanned=folder.scan())
    train_personal(after, task(Stage.PERSONAL, index=2), globals_)
    last = kept(after)
    held_out = after.splits.held_out
    seen = compute_mixture(after, held_out, globals_, last.best, last.best_level)
    assert last.best_nll == pytest.approx(-label_log_p(seen.log_p, labels_of(held_out)).mean(), abs=1e-3)


def kept(device: TrainingContext) -> LocalExpert:
    expert = LocalExpert.load(device, "s")
    assert expert is not None
    return expert
