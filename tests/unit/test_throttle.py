"""What stands between two steps: a pause that changes nothing, and what steps take, pauses left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from test_stages import device, given, task

from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache
from edge_runtime.engines.base import MemoryPlan
from edge_runtime.resources.governor import Limits
from edge_runtime.resources.level_cap import STEPS, LevelCap
from edge_runtime.resources.probe import BATCH, Plan
from edge_runtime.resources.sensors import Sensors
from edge_runtime.resources.throttle import Pace, PacedEngine
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.local_expert import train_personal
from edge_runtime.training.stages import StageFunction, train_global
from fedfmsl.protocol.messages import Stage

__all__ = ["device"]  # the fixture

Progress = tuple[str, int, int]


class Thermometer:
    """A thermal zone that a test sets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._file = root / "sys/class/thermal/thermal_zone0/temp"
        self._file.parent.mkdir(parents=True)
        (self._file.parent / "type").write_text("cpu-thermal\n")
        self.set(50.0)

    def set(self, celsius: float) -> None:
        self._file.write_text(f"{celsius * 1000:.0f}\n")


@pytest.fixture
def thermometer(tmp_path: Path) -> Thermometer:
    return Thermometer(tmp_path / "root")


@pytest.fixture(autouse=True)
def looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_runtime.resources.throttle.LOOK_SECONDS", 0.0)


@dataclass
class Host:
    """What a test does as a computation goes on, and in its pauses."""

    progress: Callable[[str, int, int], None] = lambda *_: None
    pause: Callable[[str], None] = lambda _: None


def pace_of(thermometer: Thermometer, host: Host | None = None, seconds: float = 1.0) -> Pace:
    """`seconds`: what a step at level 1 is said to have been measured at."""
    plan = Plan(
        feature_batch=4, memory_plans=dict.fromkeys((1, 2), MemoryPlan(BATCH)), seconds={1: seconds, 2: 2 * seconds}
    )
    read = Sensors(root=thermometer.root).read
    return Pace(Limits(max_temperature=75.0), read, LevelCap.planned(plan, 60.0), host or Host())


def paced(device: TrainingContext, pace: Pace) -> TrainingContext:
    cache = FeatureCache(DiskCache(device.store.root / "paced"), device.bundle, threads=1, report=pace)
    return replace(device, engine=PacedEngine(device.engine, pace), cache=cache, report=pace)


@pytest.mark.parametrize("during", ["features", "training"])
@pytest.mark.parametrize(("stage", "work"), [(Stage.GLOBAL, train_global), (Stage.PERSONAL, train_personal)])
def test_a_pause_in_the_middle_changes_nothing(
    during: str, stage: Stage, work: StageFunction, device: TrainingContext, thermometer: Thermometer
) -> None:
    progress: list[Progress] = []
    waited: list[tuple[str, Progress]] = []

    def report(activity: str, done: int, total: int) -> None:
        progress.append((activity, done, total))
        if during not in [activity for activity, _, _ in progress[:-1]] and activity == during:
            thermometer.set(80.0)

    cooling = iter([76.0, 72.0, 70.0])

    def wait(reason: str) -> None:
        waited.append((reason, progress[-1]))
        if reason:
            thermometer.set(next(cooling))

    pace = pace_of(thermometer, Host(report, wait))
    outcome = work(paced(device, pace), task(stage), given(device, level=1))
    assert [reason for reason, _ in waited] == [
        "80.0 °C, above --max-temperature 75",
        "76.0 °C, above --max-temperature 75",
        "72.0 °C, not yet 5 °C below --max-temperature 75",
        "",
    ]
    ((activity, done, total),) = {at for _, at in waited}  # nothing went on until it had become cool
    assert activity == during
    assert 0 < done < total
    assert [(activity, done) for activity, done, _ in progress][-1] == ("training", progress[-1][2])
    assert pace.reason == ""

    undisturbed = work(device, task(stage), given(device, level=1))
    assert outcome.delta is not None and undisturbed.delta is not None
    assert np.array_equal(outcome.delta, undisturbed.delta)
    assert outcome.metrics == undisturbed.metrics


class GivenUpError(Exception):
    pass


def test_a_round_can_be_given_up_in_a_pause_and_begun_again(device: TrainingContext, thermometer: Thermometer) -> None:
    def give_up(reason: str) -> None:
        raise GivenUpError

    def overheat(activity: str, done: int, total: int) -> None:
        if activity == "training":
            thermometer.set(80.0)

    pace = pace_of(thermometer, Host(overheat, give_up))
    with pytest.raises(GivenUpError):
        train_global(paced(device, pace), task(Stage.GLOBAL), given(device, level=1))
    again, undisturbed = (
        train_global(each, task(Stage.GLOBAL), given(device, level=1))
        for each in (paced(device, pace_of(cool(thermometer))), device)
    )
    assert again.delta is not None and undisturbed.delta is not None
    assert np.array_equal(again.delta, undisturbed.delta)


def cool(thermometer: Thermometer) -> Thermometer:
    thermometer.set(50.0)
    return thermometer


def test_the_sensors_are_looked_at_now_and_then(
    device: TrainingContext, thermometer: Thermometer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.resources.throttle.LOOK_SECONDS", 3600.0)
    pace = pace_of(thermometer)
    pace("training", 1, 2)
    assert pace.readings.temperature == 50.0
    thermometer.set(80.0)
    pace("training", 2, 2)
    assert pace.readings.temperature == 50.0


def test_steps_are_timed_but_for_the_first_and_without_pauses(
    device: TrainingContext, thermometer: Thermometer
) -> None:
    pause, steps = 0.5, 0

    def overheat(activity: str, done: int, total: int) -> None:
        nonlocal steps
        if activity == "training":
            steps += 1
            thermometer.set(80.0)

    def wait(reason: str) -> None:
        if reason:
            time.sleep(pause)
            thermometer.set(50.0)

    pace = pace_of(thermometer, Host(overheat, wait))
    train_global(paced(device, pace), task(Stage.GLOBAL), given(device, level=1))
    assert len(pace.cap.ratios) == steps - 1 > 1
    assert max(pace.cap.ratios) < pause


@pytest.mark.parametrize(("seconds", "level"), [(1e-9, 1), (1e9, 2)])
def test_a_training_slower_than_measured_lowers_the_cap(
    seconds: float, level: int, device: TrainingContext, thermometer: Thermometer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.resources.level_cap.UNHURRIED", 0.0)
    pace = pace_of(thermometer, seconds=seconds)
    governed = paced(device, pace)
    while len(pace.cap.ratios) < STEPS:
        train_global(governed, task(Stage.GLOBAL), given(device, level=1))
    assert pace.cap.level == level
    assert (pace.cap.slowdown > 1) == (level == 1)
