"""Two adapters in one forward pass, on graphs that were exported for one."""

from __future__ import annotations

import numpy as np
import pytest
from support.bundles import Built, hidden_of, random_samples, random_theta, relative_error
from support.samples import write_device_photos

from edge_runtime.data.features import Features
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import IMAGES
from edge_runtime.data.samples import labels_of
from edge_runtime.engines import Batch, StepGraphEngine
from edge_runtime.training.context import TrainingContext
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.mixture import label_log_p, log_softmax
from fedfmsl.protocol.messages import Training
from simulation.fleet import LocalFleet, compute_features
from simulation.methods.base import MethodSettings
from simulation.methods.dual_lora import Adapters, WideEngine, weighted_log_p
from simulation.methods.fedalt import AltState, FedALT, Model, train_individual
from simulation.methods.fedalt import Task as FedALTTask
from simulation.methods.feddpa import Task as FedDPATask
from simulation.methods.feddpa import local_weights, train_adapters
from simulation.methods.local_training import is_lora_a
from simulation.store import FileStore

LEVELS = [1, 2]
WEIGHTS = np.array([0.3, 0.7], np.float32)


@pytest.fixture(scope="module")
def context(vit: Built, tmp_path_factory: pytest.TempPathFactory) -> TrainingContext:
    root = tmp_path_factory.mktemp("device")
    photos = write_device_photos(root / "photos", {"apple": 8, "kiwi": 7, "lemon": 9}, seed=0)
    splits = {"d": scan_once(photos, vit.bundle.classes, IMAGES)}
    store = FileStore(root / "cache", sorted(sample.sha256 for sample in splits["d"].samples))
    features = Features(store, vit.bundle, threads=1)
    fleet = LocalFleet(vit.bundle, features, compute_features(features, splits, 2), root / "states", threads=1)
    return fleet.context("d")


def wide(built: Built, level: int) -> WideEngine:
    engine = WideEngine.beside(StepGraphEngine(built.bundle, threads=1))
    engine.load(level)
    return engine


def with_a_of(built: Built, theta: Vector, other: Vector) -> Vector:
    """`theta` with the A matrices of `other`."""
    result, source = theta.copy(), built.bundle.expert.split(other)
    for name, tensor in built.bundle.expert.split(result).items():
        if name.endswith("lora_A.weight"):
            tensor[:] = source[name]
    return result


@pytest.mark.parametrize("level", LEVELS)
def test_adapters_with_equal_a_are_one_adapter_with_the_weighted_sum_of_b(built: Built, level: int) -> None:
    first, second = (random_theta(built.bundle, level, seed) for seed in (1, 2))
    second = with_a_of(built, second, first)
    u, v = WEIGHTS
    single = with_a_of(built, np.asarray(u * first + v * second, np.float32), first)
    hidden = hidden_of(built, random_samples(built, 3, 0), level)
    narrow = StepGraphEngine(built.bundle, threads=1)
    narrow.load(level)
    narrow.set(single)
    engine = wide(built, level)
    engine.set(Adapters.of(built.bundle).combine(first, second, WEIGHTS))
    assert relative_error(engine.predict(hidden), narrow.predict(hidden)) < 1e-4
    assert relative_error(engine.features(hidden), narrow.features(hidden)) < 1e-4


def test_a_weight_of_zero_leaves_the_other_adapter(vit: Built) -> None:
    first, second = (random_theta(vit.bundle, 2, seed) for seed in (1, 2))
    hidden, engine, narrow = hidden_of(vit, random_samples(vit, 3, 0), 2), wide(vit, 2), StepGraphEngine(vit.bundle, 1)
    engine.set(Adapters.of(vit.bundle).combine(first, second, np.array([0, 1], np.float32)))
    narrow.load(2)
    narrow.set(second)
    assert relative_error(engine.predict(hidden), narrow.predict(hidden)) < 1e-4


def test_gradients_of_adapter_and_weights_equal_finite_differences(vit: Built) -> None:
    level, adapters, engine = 2, Adapters.of(vit.bundle), wide(vit, 2)
    first, second = (random_theta(vit.bundle, level, seed) for seed in (1, 2))
    batch = Batch.cross_entropy(hidden_of(vit, random_samples(vit, 2, 0), level), np.array([1, 3]), 4)

    def loss(theta: Vector, weights: Vector) -> float:
        engine.set(adapters.combine(theta, second, np.asarray(weights, np.float32)))
        return engine.gradient(batch)[0]

    engine.set(adapters.combine(first, second, WEIGHTS))
    of_first, of_weights = adapters.gradients(first, second, WEIGHTS, engine.gradient(batch)[1])
    for seed in range(4):  # along random directions
        step = np.random.default_rng(seed).normal(0, 1e-3, first.size).astype(np.float32)
        slope = loss(first + step, WEIGHTS) - loss(first - step, WEIGHTS)
        assert slope == pytest.approx(2 * of_first @ step, rel=0.02, abs=1e-5)
    for index in range(2):
        move = 0.01 * np.eye(2, dtype=np.float32)[index]
        slope = (loss(first, WEIGHTS + move) - loss(first, WEIGHTS - move)) / 0.02
        assert slope == pytest.approx(of_weights[index], rel=0.02, abs=1e-3)


def test_every_sample_is_predicted_with_its_own_weights(vit: Built, context: TrainingContext) -> None:
    first, second = (random_theta(vit.bundle, 2, seed) for seed in (1, 2))
    samples = context.splits.held_out[:3]
    weights = np.array([[1, 0], [0, 1], [0.5, 0.5]], np.float32)
    mixed = weighted_log_p(context, samples, first, second, weights)
    no_bias = np.zeros(4, np.float32)
    assert relative_error(mixed[0], context.log_p(samples, first, no_bias)[0]) < 1e-4
    assert relative_error(mixed[1], context.log_p(samples, second, no_bias)[1]) < 1e-4


def test_feddpa_trains_the_local_adapter_beside_the_frozen_global_one(vit: Built, context: TrainingContext) -> None:
    start = vit.bundle.initial()[0][: vit.bundle.expert.size(2)]
    training = Training(epochs=4, learning_rate=5e-3)
    task = FedDPATask(random_theta(vit.bundle, 2, 3), start, training, [0], 1, restricted=False, sent=False)
    pair = train_adapters(context, task)
    samples = context.splits.train
    half = np.full((len(samples), 2), 0.5, np.float32)

    def loss(personal: Vector) -> float:
        log_p = weighted_log_p(context, samples, personal, task.shared, half)
        return float(-label_log_p(log_p, labels_of(samples)).mean())

    assert np.array_equal(pair.theta, task.shared)
    assert loss(pair.personal) < 0.95 * loss(start)


def test_feddpa_weighs_by_the_cosine_to_training_samples_of_the_device(vit: Built, context: TrainingContext) -> None:
    personal, samples = random_theta(vit.bundle, 2, 3), context.splits.held_out
    weights = local_weights(context, samples, personal, seed=0)
    engine = StepGraphEngine(vit.bundle, threads=1)
    engine.load(2)
    engine.set(personal)
    rows = {
        name: engine.features(np.concatenate(list(context.cache.frozen(part, 2).batches())))
        for name, part in (("train", context.splits.train), ("held", samples))
    }
    unit = {name: row / np.linalg.norm(row, axis=1, keepdims=True) for name, row in rows.items()}
    cosines = unit["held"] @ unit["train"].T
    assert (weights <= 0.5).all()
    assert (weights >= 0.5 * cosines.min(axis=1) - 1e-5).all()
    assert (weights <= 0.5 * cosines.max(axis=1) + 1e-5).all()
    assert np.array_equal(weights, local_weights(context, samples, personal, seed=0))


def test_fedalt_steps_along_the_gradient_of_adapter_and_router(vit: Built, context: TrainingContext) -> None:
    rest, individual = (random_theta(vit.bundle, 2, seed) for seed in (1, 2))
    samples, rng = context.splits.train, np.random.default_rng(0)
    router = rng.normal(0, 0.3, (2, vit.bundle.manifest.dims.feature)).astype(np.float32)
    labels, pooled, rate = labels_of(samples), context.cache.pooled(samples, 2), 1e-3

    def loss(individual: Vector, router: Vector) -> float:
        weights = np.exp(log_softmax(pooled @ router.T))
        return float(-label_log_p(weighted_log_p(context, samples, individual, rest, weights), labels).mean())

    # one step over all samples: AdamW moves each value by the rate against the sign of its gradient
    training = Training(epochs=1, batch_size=100, learning_rate=rate, weight_decay=0)
    after = train_individual(context, FedALTTask(Model(individual, rest, router), training, [0], restricted=False))
    moved = np.sign(individual - after.individual), np.sign(router - after.router)
    assert np.array_equal(after.rest, rest)
    for index in np.ndindex(2, 3):
        step = np.zeros_like(router)
        step[index] = 0.05
        slope = loss(individual, router + step) - loss(individual, router - step)
        assert abs(slope) < 1e-5 or np.sign(slope) == moved[1][index]
    chosen = [slot.offset for slot in vit.bundle.expert.slots if slot.end <= individual.size and not is_lora_a(slot)]
    for offset in chosen:
        step = np.zeros_like(individual)
        step[offset] = 0.02
        slope = loss(individual + step, router) - loss(individual - step, router)
        assert abs(slope) < 1e-5 or np.sign(slope) == moved[0][offset]


def test_fedalts_rest_of_the_world_is_the_mean_of_the_others(vit: Built) -> None:
    start = vit.bundle.initial()[0][: vit.bundle.expert.size(2)]
    sent = {name: random_theta(vit.bundle, 2, seed) for seed, name in enumerate("abc")}
    settings = MethodSettings(1, Training(epochs=1, learning_rate=1e-3), 2, 0)
    untrained = np.zeros((2, 3), np.float32)
    state = AltState(settings=settings, shared=start, personal=sent, sent=sent, untrained=untrained)
    method = FedALT()
    model = method.model(state, "b")
    assert np.array_equal(model.individual, sent["b"])
    assert np.allclose(model.rest, (sent["a"] + sent["c"]) / 2, atol=1e-6)
    guest = method.model(state, "guest")
    assert np.array_equal(guest.individual, start)
    assert np.allclose(guest.rest, (sent["a"] + sent["b"] + sent["c"]) / 3, atol=1e-6)
    first = AltState(settings=settings, shared=start, untrained=untrained)
    assert np.array_equal(method.model(first, "a").rest, start)
