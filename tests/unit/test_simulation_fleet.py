"""A federation of virtual devices: real photos, real ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built, random_theta
from support.samples import write_device_photos

from edge_runtime.data.samples import labels_of
from edge_runtime.engines.step_graph import StepGraphEngine
from edge_runtime.training.context import TrainingContext
from fedfmsl.algorithms.arrays import Floats
from fedfmsl.protocol.messages import Stage, Training
from simulation.engine import ResidentEngine
from simulation.federation import accuracies, federate
from simulation.fleet import LocalFleet, open_folders
from simulation.methods.base import MethodSettings
from simulation.methods.fedfmsl import FedFMSL, Stage2
from simulation.participation import Participation
from trainer_server.config import Head, RunConfig, Trigger, sal_rules

COUNTS = {"apple": 5, "kiwi": 6, "plum": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("devices")
    return [write_device_photos(root / f"device-{index}", COUNTS, seed=index) for index in range(3)]


def fleet_of(built: Built, folders: Sequence[Path], root: Path) -> LocalFleet:
    return open_folders(built.bundle, folders, root / "states", root / "cache", threads=1)


def test_tasks_run_on_their_devices_and_results_keep_their_order(
    vit: Built, folders: list[Path], tmp_path: Path
) -> None:
    fleet = fleet_of(vit, folders, tmp_path)

    def held_out_labels(context: TrainingContext, factor: int) -> list[int]:
        return (factor * labels_of(context.splits.held_out)).tolist()

    results = fleet.map(held_out_labels, {"device-2": 1, "device-0": 10})
    expected = {name: fleet.splits(name).held_out for name in ("device-2", "device-0")}
    assert list(results) == list(expected)
    assert results["device-0"] == [10 * sample.label for sample in expected["device-0"]]
    assert fleet.seconds.keys() == expected.keys()


def test_a_run_can_be_repeated_to_the_bit(vit: Built, folders: list[Path], tmp_path: Path) -> None:
    stage1, stage2 = sal_rules(Trigger.ALL_AT_ONCE, 0.0, 2)
    config = RunConfig(
        run="r", devices=3, stage1_rounds=2, stage2_rounds=1, stage1_sal=stage1, stage2_sal=stage2, seed=1
    )
    runs = [federate(config, fleet_of(vit, folders, tmp_path / name)) for name in ("first", "second")]
    assert runs[0].norms == runs[1].norms
    assert set(runs[0].norms) == {Stage.GLOBAL, Stage.PERSONAL}
    tested, again = (accuracies(run, ("global", "mofm")) for run in runs)
    assert tested == again
    assert tested.keys() == {"device-0", "device-1", "device-2"}


def test_a_method_runs_with_participation_and_an_unseen_device(vit: Built, folders: list[Path], tmp_path: Path) -> None:
    opened = fleet_of(vit, folders, tmp_path)
    splits = {name: opened.splits(name) for name in opened.names}
    features = opened.context("device-0").cache
    fleet = LocalFleet(vit.bundle, features, splits, tmp_path / "states", threads=1, unseen={"device-2"})
    method = FedFMSL(head=Head.CLASS_MEANS, secure_sums=False)
    training = Training(epochs=1, learning_rate=1e-2)
    half = Participation(stragglers=0.5)  # of a round that asks all
    state, cost = method.start(fleet, MethodSettings(rounds=4, training=training, level=2, seed=0, participation=half))
    assert len(cost.bytes_up) == 1
    for index, devices in enumerate([("device-0",), ("device-1",), ("device-0", "device-1"), ("device-1",)]):
        state, cost = method.round(fleet, state, devices, index)
        assert cost.bytes_up.keys() == set(devices)
        assert all(size > 0 for size in [*cost.bytes_up.values(), *cost.bytes_down.values()])
    stages = [closed.round.stage for closed in state.history.rounds]
    assert stages == [Stage.STATISTICS, *[Stage.GLOBAL] * 3, Stage.HEAD, Stage.PERSONAL]
    assert [len(closed.updates) for closed in state.history.rounds] == [1, 1, 1, 2, 1, 1]

    def models(context: TrainingContext, model: Stage2) -> dict[str, Floats]:
        return method.log_p(context, model, context.splits.test)

    before = fleet.map(models, {name: method.model(state, name) for name in ("device-1", "device-2")})
    method.adapt(fleet, state, ["device-2"])
    after = fleet.map(models, {name: method.model(state, name) for name in ("device-1", "device-2")})
    for name, same in (("device-1", True), ("device-2", False)):
        assert np.array_equal(before[name]["fedfmsl"], after[name]["fedfmsl"]) is same
        assert np.array_equal(before[name]["global"], after[name]["global"])


def test_the_shared_engine_opens_each_session_once_and_gives_the_same_numbers(vit: Built) -> None:
    opened: list[str] = []

    class Recording(ResidentEngine):
        def _open(self, name: str, prepack: bool) -> object:
            opened.append(name)
            return super()._open(name, prepack)

    engine, plain = Recording(vit.bundle, threads=1), StepGraphEngine(vit.bundle, threads=1)
    for level in (1, 2, 1, 1, 2):
        dims = vit.bundle.manifest.dims
        hidden = np.random.default_rng(level).normal(size=(3, dims.tokens, dims.hidden)).astype(np.float32)
        theta = random_theta(vit.bundle, level, seed=level)
        found = []
        for each in (engine, plain):
            each.load(level)
            each.set(theta)
            found.append(each.predict(hidden))
        assert np.array_equal(*found)
    assert opened == ["predict-1.onnx", "predict-2.onnx"]
