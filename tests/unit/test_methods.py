"""The field's federated methods on a small fleet: real photos, real ONNX Runtime, independent expectations in numpy."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import Built, Floats, random_theta
from support.samples import write_device_photos

from edge_runtime.data.features import Features
from edge_runtime.data.folder import scan_once
from edge_runtime.data.inputs import IMAGES
from edge_runtime.data.samples import Sample, Splits, labels_of
from edge_runtime.training.loop import Targets, train
from fedfmsl.algorithms.adamw import AdamW
from fedfmsl.algorithms.arrays import Vector
from fedfmsl.algorithms.class_means import class_mean_head
from fedfmsl.algorithms.discriminant import discriminant_head, second_moments
from fedfmsl.algorithms.mixture import label_log_p
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.layout import Layout
from fedfmsl.protocol.messages import Stage, Training
from simulation.fleet import LocalFleet, compute_features
from simulation.methods import METHODS, method_of
from simulation.methods.base import MethodSettings, round_seed
from simulation.methods.ditto import Ditto
from simulation.methods.fedit import FedIT
from simulation.methods.local_training import Proximal, halves, is_head, is_lora_a, mask, shuffled_steps, train_steps
from simulation.methods.server import State, Trained, average, start_theta, wire_bytes
from simulation.store import FileStore
from trainer_server.config import Head

FIELD = [name for name in METHODS if not name.startswith("fedfmsl")]
ABLATIONS = [name for name in METHODS if name.startswith("fedfmsl-")]
LEVEL = 2
COUNTS = {
    "device-0": {"apple": 9, "kiwi": 5},
    "device-1": {"kiwi": 8, "lemon": 12},
    "device-2": {"plum": 30, "apple": 6},
    "guest": {"apple": 5, "lemon": 6},
}
GUEST = "guest"
NAMES = ("device-0", "device-1", "device-2")
SETTINGS = MethodSettings(
    rounds=3,
    training=Training(epochs=2, learning_rate=5e-3),
    level=LEVEL,
    seed=4,
    stage2=Training(epochs=3, learning_rate=2e-3),
)


@pytest.fixture(autouse=True)
def kept_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of logits of a random backbone give no better head, so it would be dropped, and a round of stage 2 lost."""
    monkeypatch.setattr("trainer_server.coordinator.former_head.MAX_LOSS", np.inf)


@pytest.fixture(scope="module")
def fleet(vit: Built, tmp_path_factory: pytest.TempPathFactory) -> LocalFleet:
    root = tmp_path_factory.mktemp("fleet")
    splits = {}
    for index, (name, counts) in enumerate(COUNTS.items()):
        folder = write_device_photos(root / name, counts, seed=index)
        splits[name] = scan_once(folder, vit.bundle.classes, IMAGES)
    contents = sorted({sample.sha256 for each in splits.values() for sample in each.samples})
    features = Features(FileStore(root / "cache", contents), vit.bundle, threads=1)
    return LocalFleet(vit.bundle, features, compute_features(features, splits, LEVEL), root / "states", 1, {GUEST})


@pytest.fixture(scope="module")
def layout(fleet: LocalFleet) -> Layout:
    return fleet.bundle.expert


@pytest.fixture(scope="module")
def start(fleet: LocalFleet) -> Vector:
    return start_theta(fleet, SETTINGS)[0]


def run(fleet: LocalFleet, method: Any, rounds: int = SETTINGS.rounds, devices: Sequence[str] = NAMES) -> Any:
    state, _ = method.start(fleet, SETTINGS)
    for index in range(rounds):
        state, _ = method.round(fleet, state, devices, index)
    return state


def sent_models(method: Any, state: Any) -> bytes:
    """The models of all devices, as other processes receive them."""
    return pickle.dumps([method.model(state, name) for name in (*NAMES, GUEST)])


def predict(fleet: LocalFleet, method: Any, state: Any, device: str, samples: Sequence[Sample]) -> Floats:
    """The class log-probabilities (n, C) of the device's model."""
    models = method.log_p(fleet.context(device), method.model(state, device), tuple(samples))
    log_p: Floats = models[method.name]
    return log_p


def trained_by_the_engine(fleet: LocalFleet, name: str, theta: Vector, index: int, restricted: bool) -> Vector:
    """The trainables after the device's round with the loop and the optimizer of real devices."""
    context, training = fleet.context(name), SETTINGS.training_of(index)
    samples = context.splits.train
    context.engine.load(LEVEL)
    context.engine.set(theta, training)
    hidden, targets = context.cache.frozen(samples, LEVEL), Targets.cross_entropy(labels_of(samples))
    bias = context.class_mask if restricted else np.zeros(context.classes, np.float32)
    train(context.engine, hidden, targets, bias, training, round_seed(SETTINGS, name, index), lambda *_: None)
    return context.engine.get()


def weighted_mean(fleet: LocalFleet, thetas: dict[str, Vector]) -> Floats:
    weights = {name: len(fleet.splits(name).train) for name in thetas}
    total = sum(weights.values())
    return np.sum([weights[name] / total * theta.astype(np.float64) for name, theta in thetas.items()], axis=0)


def test_the_start_has_the_class_means_of_all_devices_but_the_guest(fleet: LocalFleet, start: Vector) -> None:
    samples = [sample for name in NAMES for sample in fleet.splits(name).train]
    features = fleet.context(NAMES[0]).cache.pooled(samples, LEVEL)
    labels = labels_of(samples)
    sums = np.stack([features[labels == label].sum(axis=0) for label in range(4)])
    head = class_mean_head(sums, np.bincount(labels, minlength=4), float(np.linalg.norm(features, axis=1).sum()))
    assert np.allclose(start[: head.size], head, rtol=1e-4, atol=1e-5)
    assert np.array_equal(start[head.size :], fleet.bundle.initial()[0][head.size : start.size])


@pytest.mark.parametrize("restricted", [False, True])
def test_local_training_takes_the_steps_of_real_devices(fleet: LocalFleet, start: Vector, restricted: bool) -> None:
    name = "device-2"
    context = fleet.context(name)
    samples, training = context.splits.train, SETTINGS.training
    steps = shuffled_steps(len(samples), training, round_seed(SETTINGS, name, 0))
    theta = train_steps(context, samples, start, steps, training, np.ones_like(start), restricted=restricted)
    assert len(steps) == 4
    assert np.array_equal(theta, trained_by_the_engine(fleet, name, start, 0, restricted))


def test_frozen_trainables_stay_and_the_proximal_term_adds_its_gradient(fleet: LocalFleet, layout: Layout) -> None:
    context = fleet.context("device-1")
    samples, theta, center = context.splits.train, *(random_theta(fleet.bundle, LEVEL, seed) for seed in (1, 2))
    step, rate, decay, weight = [np.array([0, 3, 5])], 0.01, 0.1, 100.0
    training = Training(epochs=1, learning_rate=rate, weight_decay=decay)

    def one_step(proximal: Proximal | None) -> Vector:
        return train_steps(context, samples, theta, step, training, mask(layout, theta.size, is_lora_a), proximal)

    plain, drawn = one_step(None), one_step(Proximal(center, weight))
    frozen = mask(layout, theta.size, is_lora_a) == 0
    assert np.array_equal(plain[frozen], theta[frozen])
    assert np.array_equal(drawn[frozen], theta[frozen])
    # the first step of AdamW is the decay, and the rate along the sign of the gradient unless that is tiny
    moved = ((theta * (1 - rate * decay) - plain) / rate)[~frozen]
    assert (np.abs(np.abs(moved) - 1) < 0.02).mean() > 0.95
    pulled = ((theta * (1 - rate * decay) - drawn) / rate)[~frozen]
    far = np.abs(weight * (theta - center)[~frozen]) > 1  # above the gradient of the loss
    assert np.sign(pulled[far]).tolist() == np.sign((theta - center)[~frozen][far]).tolist()


def test_phases_share_the_steps_of_a_round() -> None:
    steps = [np.array([index]) for index in range(5)]
    assert [len(part) for part in halves(steps, 0)] == [2, 3]
    assert [len(part) for part in halves(steps, 1)] == [3, 2]
    assert [len(part) for index in range(2) for part in halves(steps[:1], index)] == [0, 1, 1, 0]


@pytest.mark.parametrize("name", FIELD)
def test_every_method_takes_the_same_number_of_steps(
    fleet: LocalFleet, start: Vector, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: Counter[int] = Counter()
    plain_step = AdamW.step

    def counted(self: AdamW, theta: Vector, gradient: Vector) -> Vector:
        taken[theta.size] += 1
        return plain_step(self, theta, gradient)

    monkeypatch.setattr(AdamW, "step", counted)
    run(fleet, method_of(name))
    samples = [len(fleet.splits(device).train) for device in NAMES]
    if name == "centralised":
        samples = [sum(samples)]
    assert taken[start.size] == sum((2 + 2 + 3) * -(-size // 16) for size in samples)


def test_fedit_is_the_mean_weighted_by_samples(fleet: LocalFleet, start: Vector) -> None:
    method: Any = method_of("fedit")
    state = run(fleet, method, rounds=1)
    trained = {name: trained_by_the_engine(fleet, name, start, 0, method.restricted) for name in NAMES}
    assert np.abs(state.shared - start).max() > 1e-3
    assert np.abs(state.shared - weighted_mean(fleet, trained)).max() < 1e-6
    results = {name: Trained(theta, len(fleet.splits(name).train)) for name, theta in trained.items()}
    assert np.array_equal(state.shared, average(fleet.bundle, start, results))


def test_fedprox_without_its_term_is_fedit_and_with_it_stays_nearer(fleet: LocalFleet, start: Vector) -> None:
    fedit = run(fleet, method_of("fedit")).shared

    def fedprox(weight: float) -> Vector:
        method: Any = method_of("fedprox")
        method.proximal, method.restricted = weight, FedIT.restricted
        shared: Vector = run(fleet, method).shared
        return shared

    assert np.array_equal(fedprox(0.0), fedit)
    assert np.linalg.norm(fedprox(10.0) - start) < 0.9 * np.linalg.norm(fedit - start)


def test_fedit_head_replaces_the_head_of_fedit_after_the_last_round(fleet: LocalFleet, layout: Layout) -> None:
    states, costs = {}, {}
    for name in ("fedit", "fedit-head"):
        method: Any = method_of(name)
        state = run(fleet, method, rounds=2)
        states[name], costs[name] = method.round(fleet, state, NAMES, 2)
    fedit, headed = states["fedit"].shared, states["fedit-head"].shared
    head = mask(layout, fedit.size, is_head) == 1
    assert np.array_equal(headed[~head], fedit[~head])
    features, labels = [], []
    for name in NAMES:
        context = fleet.context(name)
        context.engine.load(LEVEL)
        context.engine.set(fedit)
        states = context.cache.frozen(context.splits.train, LEVEL)
        features.append(context.engine.features(states.batch(np.arange(len(context.splits.train)))))
        labels.append(labels_of(context.splits.train))
    x, y = np.concatenate(features), np.concatenate(labels)
    sums = np.stack([x[y == label].sum(axis=0) for label in range(4)])
    expected = discriminant_head(sums, np.bincount(y, minlength=4).astype(np.float32), second_moments(x))
    assert headed[head] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert costs["fedit-head"].bytes_up[NAMES[0]] > costs["fedit"].bytes_up[NAMES[0]]


def test_ffa_lora_trains_and_sends_everything_but_a(fleet: LocalFleet, layout: Layout, start: Vector) -> None:
    method = method_of("ffa-lora")
    state, cost = method.round(fleet, method.start(fleet, SETTINGS)[0], NAMES, 0)
    is_a = mask(layout, start.size, is_lora_a) == 1
    assert np.array_equal(state.shared[is_a], start[is_a])
    assert (state.shared[~is_a] != start[~is_a]).mean() > 0.9
    saved = wire_bytes(fleet.bundle, start) - cost.bytes_up[NAMES[0]]
    assert 4 * is_a.sum() < saved < 4 * is_a.sum() + 1000  # the values, and their names


def test_fedsa_lora_sends_a_and_nothing_else(fleet: LocalFleet, layout: Layout, start: Vector) -> None:
    method: Any = method_of("fedsa-lora")
    state, _ = method.round(fleet, method.start(fleet, SETTINGS)[0], NAMES, 0)
    before = {name: method.model(state, name) for name in NAMES}
    after, cost = method.round(fleet, state, NAMES, 1)
    is_a = mask(layout, start.size, is_lora_a) == 1
    trained = {name: trained_by_the_engine(fleet, name, theta, 1, method.restricted) for name, theta in before.items()}
    assert np.abs(after.shared[is_a] - weighted_mean(fleet, trained)[is_a]).max() < 1e-6
    assert np.array_equal(after.shared[~is_a], start[~is_a])
    for name in NAMES:
        model = method.model(after, name)
        assert np.array_equal(model[~is_a], trained[name][~is_a])
        assert np.array_equal(model[is_a], after.shared[is_a])
        assert 4 * is_a.sum() < cost.bytes_up[name] < 4 * is_a.sum() + 1000
    guest = method.model(after, GUEST)
    assert np.array_equal(guest, after.shared)


def test_fedrep_trains_the_head_on_the_received_body_then_the_body(
    fleet: LocalFleet, layout: Layout, start: Vector
) -> None:
    method: Any = method_of("fedrep")
    state, cost = method.round(fleet, method.start(fleet, SETTINGS)[0], NAMES, 0)
    head = mask(layout, start.size, is_head)
    ends = {}
    for name in NAMES:
        context = fleet.context(name)
        samples, training = context.splits.train, SETTINGS.training
        steps = shuffled_steps(len(samples), training, round_seed(SETTINGS, name, 0))
        half = len(steps) // 2
        loss = {"restricted": method.restricted}
        middle = train_steps(context, samples, start, steps[:half], training, head, **loss)
        ends[name] = train_steps(context, samples, middle, steps[half:], training, 1 - head, **loss)
        assert np.array_equal(method.model(state, name)[head == 1], middle[head == 1])
    assert np.array_equal(state.shared[head == 1], start[head == 1])
    assert np.abs(state.shared - weighted_mean(fleet, ends))[head == 0].max() < 1e-6
    assert cost.bytes_up[NAMES[0]] < wire_bytes(fleet.bundle, start) - 4 * head.sum()


def test_fine_tuning_leaves_the_shared_model_and_sends_nothing(fleet: LocalFleet, start: Vector) -> None:
    method: Any = method_of("fine-tuning")
    state = run(fleet, method, rounds=2)
    assert np.array_equal(state.shared, run(fleet, method_of("fedit"), rounds=2).shared)
    assert np.array_equal(method.model(state, NAMES[0]), state.shared)
    after, cost = method.round(fleet, state, NAMES, 2)
    assert np.array_equal(after.shared, state.shared)
    for name in NAMES:
        tuned = trained_by_the_engine(fleet, name, state.shared, 2, method.restricted)
        assert np.array_equal(method.model(after, name), tuned)
    assert not cost.bytes_up
    assert cost.bytes_down == dict.fromkeys(NAMES, wire_bytes(fleet.bundle, start))


def test_local_only_starts_from_the_devices_own_class_means(fleet: LocalFleet) -> None:
    method: Any = method_of("local-only")
    state, cost = method.start(fleet, SETTINGS)
    assert not cost.bytes_up
    own = method.model(state, "device-0")
    after, cost = method.round(fleet, state, NAMES, 0)
    alone = trained_by_the_engine(fleet, "device-0", own, 0, method.restricted)
    assert np.array_equal(method.model(after, "device-0"), alone)
    rows = fleet.bundle.expert.split(own)["classifier.weight"]
    assert np.abs(rows[[2, 3]]).max() == 0  # it has no lemons and no plums
    assert not cost.bytes_up and not cost.bytes_down


def test_ditto_draws_personal_models_to_the_global_one(fleet: LocalFleet, start: Vector) -> None:
    near, free = (run(fleet, Ditto(proximal)) for proximal in (100.0, 0.0))
    assert np.array_equal(near.shared, free.shared)  # the personal models are never sent
    for name in NAMES:
        far = np.linalg.norm(free.personal[name] - free.shared)
        assert np.linalg.norm(near.personal[name] - near.shared) < 0.5 * far


def test_ditto_without_its_term_trains_personal_models_that_are_never_restarted(
    fleet: LocalFleet, start: Vector
) -> None:
    state, name = run(fleet, Ditto(0.0), rounds=2), "device-1"
    context, expected = fleet.context(name), start
    samples = context.splits.train
    for index in range(2):
        steps = shuffled_steps(len(samples), SETTINGS.training, round_seed(SETTINGS, name, index))
        own, everything = halves(steps, index)[0], np.ones_like(start)
        expected = train_steps(
            context, samples, expected, own, SETTINGS.training, everything, restricted=Ditto.restricted
        )
    assert np.array_equal(state.personal[name], expected)


def test_centralised_training_is_one_device_with_everything(fleet: LocalFleet, start: Vector) -> None:
    pool = tuple(sample for name in NAMES for sample in fleet.splits(name).train)
    alone = LocalFleet(
        fleet.bundle, fleet.context(NAMES[0]).cache, {NAMES[0]: Splits(pool, (), ())}, Path("unused"), threads=1
    )
    state = State(SETTINGS, start)
    pooled, cost = method_of("centralised").round(fleet, state, NAMES, 0)
    single, _ = method_of("fedit").round(alone, state, NAMES[:1], 0)
    assert np.abs(pooled.shared - single.shared).max() < 1e-6
    assert cost.bytes_up["device-1"] == sum(s.path.stat().st_size for s in fleet.splits("device-1").train)


@pytest.mark.parametrize("name", FIELD)
def test_a_device_that_took_no_part_has_a_model_and_adapts_alone(fleet: LocalFleet, name: str) -> None:
    method = method_of(name)
    state = run(fleet, method, rounds=1)
    samples = fleet.splits(GUEST).samples
    before = predict(fleet, method, state, GUEST, samples)
    assert before.shape == (len(samples), 4)
    assert np.exp(before).sum(axis=1) == pytest.approx(1, abs=1e-4)
    adapted = method.adapt(fleet, state, [GUEST])
    shared_only = name in ("fedit", "fedprox", "ffa-lora", "centralised", "fedit-head")
    assert np.array_equal(before, predict(fleet, method, adapted, GUEST, samples)) == shared_only
    for device in NAMES:
        own = fleet.splits(device).held_out
        assert np.array_equal(*(predict(fleet, method, each, device, own) for each in (state, adapted)))
    assert predict(fleet, method, state, GUEST, ()).shape == (0, 4)


@pytest.mark.parametrize("name", FIELD)
def test_every_method_learns_and_can_be_repeated_to_the_bit(fleet: LocalFleet, name: str) -> None:
    method = method_of(name)
    state = run(fleet, method)

    def loss(state: Any) -> float:
        """The mean over the training samples of all devices."""
        losses = []
        for device in NAMES:
            samples = fleet.splits(device).train
            log_p = predict(fleet, method, state, device, samples)
            losses.append(-label_log_p(log_p, labels_of(samples)))
        return float(np.concatenate(losses).mean())

    assert loss(state) < 0.97 * loss(method.start(fleet, SETTINGS)[0])
    assert sent_models(method, run(fleet, method)) == sent_models(method, state)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_a_whole_run_that_differs_in_one_part(fleet: LocalFleet, name: str) -> None:
    runs = {}
    for each in ("fedfmsl", name):
        method = method_of(each)
        federation = run(fleet, method)
        runs[each] = federation, predict(fleet, method, federation, NAMES[0], fleet.splits(NAMES[0]).held_out)
    (_, expected), (ablated, log_p) = runs["fedfmsl"], runs[name]
    trained = [closed.round for closed in ablated.history.rounds if closed.round.stage is Stage.GLOBAL]
    assert trained[0].level == (LEVEL if name == "fedfmsl-all-at-once" else 1)
    different = name != "fedfmsl-fixed-schedule"  # too few rounds to activate a block
    assert np.array_equal(expected, log_p) != different
    gate = fleet.bundle.initial()[1]
    assert np.array_equal(ablated.received.gate, gate) == (name == "fedfmsl-untrained-gate")
    if name == "fedfmsl-no-gate":
        models = method_of("fedfmsl").log_p(
            fleet.context(NAMES[0]), method.model(ablated, NAMES[0]), fleet.splits(NAMES[0]).held_out
        )
        halves_of_both = (np.exp(models["global"]) + np.exp(models["local-expert"])) / 2
        assert np.exp(log_p) == pytest.approx(halves_of_both, abs=1e-6)
    assert (ablated.config.head is Head.CLASS_MEANS) == (name == "fedfmsl-feature-sums")


def test_a_name_that_no_method_has_is_an_error() -> None:
    assert all(method_of(name).name == name for name in METHODS)
    with pytest.raises(ConfigError, match=r"fedfoo.*fedit"):
        method_of("fedfoo")


def test_the_last_rounds_have_their_own_training() -> None:
    assert list(SETTINGS.stage2_indices) == [2]
    assert [SETTINGS.training_of(index).epochs for index in range(3)] == [2, 2, 3]
    assert list(replace(SETTINGS, rounds=17).stage2_indices) == [12, 13, 14, 15, 16]  # as the server's defaults


@pytest.mark.parametrize("name", FIELD)
def test_a_round_may_have_some_devices_or_none(fleet: LocalFleet, name: str) -> None:
    method = method_of(name)
    state = run(fleet, method, rounds=1, devices=NAMES[:1])
    before = predict(fleet, method, state, NAMES[1], fleet.splits(NAMES[1]).held_out)
    after, cost = method.round(fleet, state, [], 1)
    if name != "centralised":  # it has all samples in every round
        assert np.array_equal(before, predict(fleet, method, after, NAMES[1], fleet.splits(NAMES[1]).held_out))
    assert not cost.bytes_up and not cost.bytes_down
