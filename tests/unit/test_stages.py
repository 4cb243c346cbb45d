"""The stages on a device: real photos, real ONNX Runtime, real files."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built, random_theta
from support.training_contexts import SAL, announced_round, initial_globals, training_context

from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.data.folder import SampleFolder
from edge_runtime.data.samples import Splits, labels_of
from edge_runtime.engines.base import Batch
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.local_expert import LocalExpert, train_personal
from edge_runtime.training.memo import Memo
from edge_runtime.training.mixture import compute_mixture, global_temperature
from edge_runtime.training.stages import (
    Globals,
    head_statistics,
    measure_global,
    statistics,
    train_class_sums,
    train_global,
)
from edge_runtime.training.updates import prepare_update
from fedfmsl.algorithms.arrays import Floats, Tensors, Vector
from fedfmsl.algorithms.class_means import class_mean_head
from fedfmsl.algorithms.discriminant import second_moments
from fedfmsl.algorithms.mixture import label_log_p
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.algorithms.sal import AllAtOnce
from fedfmsl.protocol.encoding import decode
from fedfmsl.protocol.messages import Encoding, Stage, Sums
from fedfmsl.protocol.task_bundle import TaskBundle


@pytest.fixture
def context(vit: Built, photos: Path, tmp_path: Path) -> TrainingContext:
    return training_context(vit.bundle, photos, tmp_path)


def head(sums: Tensors) -> Vector:
    named = {name: np.asarray(tensor, np.float32) for name, tensor in sums.items()}
    return class_mean_head(named["class_sums"], named["class_counts"], float(named["norm_sum"][0]))


def test_stage_1_returns_the_delta_at_the_level_cap(context: TrainingContext) -> None:
    globals_ = initial_globals(context.bundle, level=2)
    before = globals_.expert.copy()
    result = train_global(context, announced_round(Stage.GLOBAL, level=2), globals_)
    size = context.bundle.expert.size(1)
    assert result.level == 1
    assert result.delta is not None
    assert result.delta.shape == (size,)
    assert result.delta.any()
    assert np.array_equal(globals_.expert, before)
    assert np.array_equal(result.delta, context.engine.get() - before[:size])


def test_samples_train_the_rows_of_novel_classes_only_for_a_head_that_sums_replace(
    vit: Built, photos: Path, tmp_path: Path
) -> None:
    some = shutil.copytree(photos, tmp_path / "some")
    shutil.rmtree(some / vit.bundle.classes[0])
    context = training_context(vit.bundle, some, tmp_path)
    for sums in (Sums.NONE, Sums.LOGITS):
        round_ = announced_round(Stage.GLOBAL, sums=sums)
        result = train_global(context, round_, initial_globals(context.bundle, level=1))
        assert result.delta is not None
        rows = context.bundle.expert.split(result.delta)["classifier.weight"]
        assert rows[1].any() and rows[0].any() == (sums is Sums.LOGITS)


def test_a_canary_measures_what_training_reports_and_changes_nothing(context: TrainingContext) -> None:
    published = initial_globals(context.bundle, level=1)
    published.expert[:] = random_theta(context.bundle, 1, seed=1)
    measured = measure_global(context, announced_round(Stage.CANARY), published)
    trained = train_global(context, announced_round(Stage.GLOBAL), published).metrics
    assert dict(measured.metrics) == {name: trained[name] for name in ("held_out_global", "global_nll")}
    assert (measured.tensors, measured.delta, measured.samples) == ({}, None, len(context.splits.held_out))


@pytest.mark.parametrize(("cap", "kind"), [(1, Sums.FEATURES), (2, Sums.FEATURES), (2, Sums.LOGITS)])
def test_the_head_round_sends_sums_of_the_experts_logits_or_of_the_features_that_its_head_reads(
    context: TrainingContext, cap: int, kind: Sums
) -> None:
    """Whatever the level cap, because the LoRA below it is applied, too."""
    theta = random_theta(context.bundle, 2, seed=1)
    result = head_statistics(
        replace(context, level_cap=cap), announced_round(Stage.HEAD, level=2, sums=kind), Globals(theta, theta, theta)
    )
    samples, labels = context.splits.train, labels_of(context.splits.train)
    assert (result.samples, result.level, result.delta, dict(result.metrics)) == (len(samples), cap, None, {})
    context.engine.load(2)
    context.engine.set(theta)
    hidden = context.hidden_states(samples, theta, 2)
    features, logits = (
        np.concatenate([compute(batch) for batch in hidden.batches()])
        for compute in (context.engine.features, context.engine.predict)
    )
    parts = context.bundle.expert.split(theta)
    assert np.allclose(features @ parts["classifier.weight"].T + parts["classifier.bias"], logits, atol=1e-4)
    sums, values = result.tensors["class_sums"], logits if kind is Sums.LOGITS else features
    for label in range(context.classes):
        assert np.allclose(sums[label], values[labels == label].sum(axis=0), rtol=1e-2, atol=2e-2)
    assert np.array_equal(result.tensors["class_counts"], np.bincount(labels))
    wanted = second_moments(values)
    assert np.allclose(result.tensors["second_moments"], wanted, atol=1e-2 * np.abs(wanted).max())


def test_a_class_with_too_few_samples_or_that_is_not_asked_for_is_in_no_sum(context: TrainingContext) -> None:
    theta = random_theta(context.bundle, 1, seed=1)
    counts = np.bincount(labels_of(context.splits.train), minlength=context.classes)
    for change, kept in (
        ({"min_class_count": int(counts.max()) + 1}, np.zeros(counts.size, np.bool_)),
        ({"min_class_count": int(counts.max())}, counts == counts.max()),
        ({"classes": (1,)}, np.arange(counts.size) == 1),
    ):
        tensors = head_statistics(
            context, announced_round(Stage.HEAD, sums=Sums.LOGITS, **change), Globals(theta, theta, theta)
        ).tensors
        assert np.array_equal(tensors["class_counts"], np.where(kept, counts, 0))
        assert np.array_equal(np.asarray(tensors["class_sums"]).any(axis=1), kept & (counts > 0))
        assert np.asarray(tensors["second_moments"]).any() == kept.any()


def test_without_class_sums_a_device_sends_only_counts_and_norms(context: TrainingContext) -> None:
    nothing = initial_globals(context.bundle, level=1)
    tensors = statistics(context, announced_round(Stage.STATISTICS, sums=Sums.NONE), nothing).tensors
    assert not np.asarray(tensors["class_sums"]).any()
    assert np.asarray(tensors["norm_sum"]).item() > 0


def test_logits_are_computed_again_only_for_other_samples_or_trainables(context: TrainingContext) -> None:
    predicted = list[int]()

    class CountingEngine(StepGraphEngine):
        def predict(self, hidden: Floats) -> Floats:
            predicted.append(len(hidden))
            return super().predict(hidden)

    counting = replace(context, engine=CountingEngine(context.bundle, threads=1))
    samples, globals_ = context.splits.held_out, initial_globals(context.bundle, level=2)
    other = globals_.expert + np.float32(0.01)
    for theta, part, level in (
        (globals_.expert, samples, 2),
        (other, samples, 2),
        (other, samples[1:], 2),
        (other, samples, 1),  # below a LoRA of `globals_.expert`, so other hidden states
    ):
        before = len(predicted)
        first = counting.logits(part, globals_.expert, theta, level)
        assert len(predicted) > before
        before = len(predicted)
        assert counting.logits(part, globals_.expert, theta, level) is first
        assert len(predicted) == before
        fresh = replace(context, memo=Memo())
        assert np.array_equal(fresh.logits(part, globals_.expert, theta, level), first)


def test_stage_2_returns_the_delta_of_the_gate_adapter(context: TrainingContext) -> None:
    globals_ = initial_globals(context.bundle, level=1)
    before = globals_.gate.copy()
    result = train_personal(context, announced_round(Stage.PERSONAL), globals_)
    assert result.delta is not None
    assert result.delta.shape == (context.bundle.gate.total,)
    assert 0 < np.abs(result.delta).max() < 0.1  # a few steps at a low learning rate
    assert np.array_equal(globals_.gate, before)


class RecordingEngine(StepGraphEngine):
    """Records the loss of each step."""

    def step(self, batch: Batch) -> float:
        self.losses = [*getattr(self, "losses", []), super().step(batch)]
        return self.losses[-1]


def stage_2(context: TrainingContext, level_cap: int, index: int) -> tuple[LocalExpert, list[float], set[str]]:
    """The local expert after a round of plain LoRA, the loss of each step, and the new folders of hidden states."""
    everything = replace(SAL, trigger=AllAtOnce())
    engine = RecordingEngine(context.bundle, threads=1)
    before = {path.name for path in context.store.cache.iterdir()}
    round_ = announced_round(Stage.PERSONAL, level=2, index=index).model_copy(update={"sal": everything})
    train_personal(
        replace(context, engine=engine, level_cap=level_cap), round_, initial_globals(context.bundle, level=2)
    )
    expert = LocalExpert.load(context, "s")
    assert expert is not None
    return expert, engine.losses, {path.name for path in context.store.cache.iterdir()} - before


def test_a_local_expert_above_a_lowered_level_cap_is_trained_in_the_highest_blocks_only(
    context: TrainingContext,
) -> None:
    before, _, _ = stage_2(context, level_cap=2, index=0)
    saved = context.store.personal.read_bytes()
    _, expected, created = stage_2(context, level_cap=2, index=1)
    assert not created
    context.store.personal.write_bytes(saved)
    after, losses, created = stage_2(context, level_cap=1, index=1)
    assert losses[0] == pytest.approx(expected[0], rel=1e-3)  # the same model, with fp16 hidden states
    assert len(created) == 1 and "level-1-above-2-" in created.pop()
    above = context.bundle.expert.size(1)
    assert (after.theta[:above] != before.theta[:above]).mean() > 0.9
    assert np.array_equal(after.theta[above:], before.theta[above:])
    assert after.sal.level == 2  # trained again after the cap is raised
    assert after.best_nll <= before.best_nll


def test_a_local_expert_uses_the_hidden_states_of_the_global_expert_below_its_level(context: TrainingContext) -> None:
    globals_ = initial_globals(context.bundle, level=2)
    hidden = context.hidden_states(context.splits.train, globals_.expert, 1)
    folders = {path.name for path in context.store.cache.iterdir()}
    train_personal(context, announced_round(Stage.PERSONAL), globals_)
    assert hidden.folder in folders
    assert {path.name for path in context.store.cache.iterdir() if "-above-" in path.name} == {hidden.folder}


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("stage", [Stage.GLOBAL, Stage.PERSONAL])
def test_the_update_equals_the_delta_except_for_the_encoding(
    context: TrainingContext, stage: Stage, encoding: Encoding
) -> None:
    round_, globals_ = announced_round(stage, encoding=encoding), initial_globals(context.bundle, level=1)
    stage_function, layout = (
        (train_global, context.bundle.expert) if stage is Stage.GLOBAL else (train_personal, context.bundle.gate)
    )
    result = stage_function(context, round_, globals_)
    assert result.delta is not None
    update = prepare_update(context.bundle, context.store.residual, round_, result, np.random.default_rng(0))
    assert np.abs(decode(layout, update.tensors, encoding) - result.delta).max() <= np.abs(result.delta).max() / 250


def test_private_statistics_of_real_features_give_almost_the_same_head(context: TrainingContext) -> None:
    low_noise = Privacy(clip=1.0, noise_multiplier=1e-6, shares=1)
    round_ = announced_round(Stage.STATISTICS, privacy=low_noise, sums=Sums.FEATURES)
    result = statistics(context, round_, initial_globals(context.bundle, level=1))
    update = prepare_update(context.bundle, context.store.residual, round_, result, np.random.default_rng(0))
    expected = head(train_class_sums(context, 1))
    assert np.allclose(head(update.tensors), expected, atol=1e-3 * np.abs(expected).max())


@pytest.fixture
def watched(context: TrainingContext, photos: Path, tmp_path: Path) -> tuple[TrainingContext, SampleFolder]:
    """The context with a copy of the photos whose modification times are old."""
    root = shutil.copytree(photos, tmp_path / "photos")
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    folder = SampleFolder(root, context.bundle, context.store)
    return replace(context, scanned=folder.scan()), folder


def contents(splits: Splits) -> list[list[str]]:
    return [[each.sha256 for each in part] for part in (splits.train, splits.held_out, splits.test)]


def test_splits_are_assigned_once_and_equal_after_the_next_scan(
    watched: tuple[TrainingContext, SampleFolder], context: TrainingContext, tmp_path: Path
) -> None:
    before, folder = watched
    assert contents(before.splits) == contents(context.splits)
    root = shutil.copytree(context.bundle.root, tmp_path / "no-features")
    (root / "features.onnx").unlink()  # computing features again would fail
    cache = FeatureCache(DiskCache(tmp_path / "empty"), TaskBundle.load(root), threads=1)
    after = replace(before, scanned=folder.scan(), cache=cache)
    assert after.splits == before.splits


def test_new_samples_are_used_and_deleted_ones_are_not(watched: tuple[TrainingContext, SampleFolder]) -> None:
    context, folder = watched
    round_ = announced_round(Stage.STATISTICS)
    first = statistics(context, round_, initial_globals(context.bundle, level=1))
    deleted, original = [each for each in context.splits.train if each.label == 0][:2]
    for number in range(20):
        copy = original.path.with_name(f"new-{number}.jpg")
        copy.write_bytes(original.path.read_bytes() + bytes([number]))
        os.utime(copy, (1e9, 1e9))
    deleted.path.unlink()
    after = replace(context, scanned=folder.scan())
    second = statistics(after, round_, initial_globals(context.bundle, level=1))
    tested = sum(each.path.name.startswith("new-") for each in after.splits.test)
    assert 0 < tested < 10
    added = 20 - tested - 1
    assert second.samples == first.samples + added
    assert second.tensors["class_counts"][0] == first.tensors["class_counts"][0] + added
    assert after.class_counts[0] == context.class_counts[0] + added
    assert contents(after.splits)[1] == contents(context.splits)[1]  # each is a near-duplicate of a training sample


def test_the_best_expert_is_scored_again_when_the_held_out_split_changes(
    watched: tuple[TrainingContext, SampleFolder],
) -> None:
    context, folder = watched
    globals_ = initial_globals(context.bundle, level=1)
    train_personal(context, announced_round(Stage.PERSONAL), globals_)
    first = saved_expert(context)
    unbeatable = replace(first, best_nll=-1e9)
    unbeatable.save(context, "s")
    train_personal(context, announced_round(Stage.PERSONAL, index=1), globals_)
    assert saved_expert(context).best_nll == -1e9
    for sample in context.splits.held_out[1:]:
        sample.path.unlink()
    after = replace(context, scanned=folder.scan())
    train_personal(after, announced_round(Stage.PERSONAL, index=2), globals_)
    last = saved_expert(after)
    held_out = after.splits.held_out
    temperature = global_temperature(after, globals_)
    mixture = compute_mixture(after, held_out, globals_, temperature, last.best, last.best_level)
    assert last.best_nll == pytest.approx(-label_log_p(mixture.log_p, labels_of(held_out)).mean(), abs=1e-3)


def saved_expert(context: TrainingContext) -> LocalExpert:
    expert = LocalExpert.load(context, "s")
    assert expert is not None
    return expert
