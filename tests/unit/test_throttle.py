"""Between two steps: pauses that change nothing, stops, and step times without the pauses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.bundles import Built
from support.in_process_daemon import no_report
from support.training_contexts import announced_round, initial_globals, training_context

from edge_runtime.data.cache import DiskCache
from edge_runtime.data.features import FeatureCache, Report
from edge_runtime.engines.base import MemoryPlan
from edge_runtime.resources.governor import Governor, Limits
from edge_runtime.resources.level_cap import FAST_ENOUGH, STEPS, LevelCap
from edge_runtime.resources.plan import Plan
from edge_runtime.resources.probe import BATCH
from edge_runtime.resources.sensors import Sensors
from edge_runtime.resources.throttle import (
    ControlledEngine,
    LevelCapTracker,
    StepControl,
    WorkStoppedError,
    reported_and_checked,
)
from edge_runtime.training.context import TrainingContext
from edge_runtime.training.local_expert import train_personal
from edge_runtime.training.stages import StageFunction, train_global
from fedfmsl.protocol.messages import Stage

Progress = tuple[str, int, int]
PAUSE = 0.3  # seconds, long against a step


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


@pytest.fixture
def device(vit: Built, photos: Path, tmp_path: Path) -> TrainingContext:
    return training_context(vit.bundle, photos, tmp_path)


@pytest.fixture
def control() -> StepControl:
    return StepControl()


def tracker_of(seconds: float = 1.0, fast_enough: float = FAST_ENOUGH) -> LevelCapTracker:
    """`seconds`: what the probe measured for a step at level 1."""
    plan = Plan(
        feature_batch=4,
        memory_plans=dict.fromkeys((1, 2), MemoryPlan(BATCH)),
        seconds={1: seconds, 2: 2 * seconds},
    )
    return LevelCapTracker(LevelCap.planned(plan, 60.0, fast_enough))


def controlled(
    device: TrainingContext, control: StepControl, report: Report = no_report, tracker: LevelCapTracker | None = None
) -> TrainingContext:
    """The device with its computation under control."""
    report = reported_and_checked(report, control.check)
    cache = FeatureCache(DiskCache(device.store.root / "controlled"), device.bundle, threads=1, report=report)
    engine = ControlledEngine(device.engine, control, tracker or tracker_of())
    return replace(device, engine=engine, cache=cache, report=report)


def first_of(during: str, action: Callable[[], None]) -> tuple[list[Progress], Report]:
    """A Report that keeps all progress and takes an action at the first of an activity."""
    progress: list[Progress] = []

    def report(activity: str, done: int, total: int) -> None:
        is_first = activity == during and during not in [before for before, _, _ in progress]
        progress.append((activity, done, total))
        if is_first:
            action()

    return progress, report


@pytest.mark.parametrize("during", ["features", "training"])
@pytest.mark.parametrize(("stage", "work"), [(Stage.GLOBAL, train_global), (Stage.PERSONAL, train_personal)])
def test_a_pause_in_the_middle_changes_nothing(
    during: str, stage: Stage, work: StageFunction, device: TrainingContext, control: StepControl
) -> None:
    at_the_end: list[Progress] = []

    def resume() -> None:
        at_the_end.append(progress[-1])
        control.pause(False)

    def pause() -> None:
        control.pause(True)
        threading.Timer(PAUSE, resume).start()

    progress, report = first_of(during, pause)
    outcome = work(controlled(device, control, report), announced_round(stage), initial_globals(device.bundle, level=1))
    ((activity, done, total),) = at_the_end  # nothing was computed until the end of the pause
    assert activity == during
    assert 0 < done < total
    assert progress[-1] == ("training", progress[-1][2], progress[-1][2])

    undisturbed = work(device, announced_round(stage), initial_globals(device.bundle, level=1))
    assert outcome.delta is not None and undisturbed.delta is not None
    assert np.array_equal(outcome.delta, undisturbed.delta)
    assert outcome.metrics == undisturbed.metrics


@pytest.mark.parametrize("paused", [False, True], ids=["while it computes", "in a pause"])
def test_a_round_can_be_stopped_and_computed_again(paused: bool, device: TrainingContext, control: StepControl) -> None:
    def stop() -> None:
        control.pause(paused)
        threading.Timer(PAUSE, control.stop).start() if paused else control.stop()

    _, report = first_of("training", stop)
    with pytest.raises(WorkStoppedError):
        train_global(
            controlled(device, control, report), announced_round(Stage.GLOBAL), initial_globals(device.bundle, level=1)
        )
    control.stop(False)
    control.pause(False)
    again, undisturbed = (
        train_global(each, announced_round(Stage.GLOBAL), initial_globals(device.bundle, level=1))
        for each in (controlled(device, control), device)
    )
    assert again.delta is not None and undisturbed.delta is not None
    assert np.array_equal(again.delta, undisturbed.delta)


def test_a_governor_pauses_by_its_sensors_until_it_is_cool_enough(thermometer: Thermometer) -> None:
    governor = Governor(Limits(max_temperature=75.0), Sensors(root=thermometer.root).read)
    reasons = []
    for celsius in (74.0, 80.0, 76.0, 72.0, 70.0, 72.0):
        thermometer.set(celsius)
        reasons.append(governor.check())
    assert reasons == [
        "",
        "80.0 °C, above --max-temperature 75",
        "76.0 °C, above --max-temperature 75",
        "72.0 °C, not yet 5 °C below --max-temperature 75",
        "",
        "",
    ]


def test_steps_are_timed_but_for_the_first_and_without_pauses(device: TrainingContext, control: StepControl) -> None:
    tracker = tracker_of()

    def pause() -> None:
        control.pause(True)
        threading.Timer(PAUSE, control.pause, [False]).start()

    progress, report = first_of("training", pause)
    train_global(
        controlled(device, control, report, tracker),
        announced_round(Stage.GLOBAL),
        initial_globals(device.bundle, level=1),
    )
    steps = len([activity for activity, _, _ in progress if activity == "training"])
    assert len(tracker.cap.ratios) == steps - 1 > 1
    assert max(tracker.cap.ratios) < PAUSE


@pytest.mark.parametrize(("seconds", "level"), [(1e-9, 1), (1e9, 2)])
def test_a_training_slower_than_measured_lowers_the_cap(
    seconds: float, level: int, device: TrainingContext, control: StepControl
) -> None:
    tracker = tracker_of(seconds, fast_enough=0.0)
    tracked = controlled(device, control, tracker=tracker)
    while len(tracker.cap.ratios) < STEPS:
        train_global(tracked, announced_round(Stage.GLOBAL), initial_globals(device.bundle, level=1))
    assert tracker.cap.level == level
    assert (tracker.cap.slowdown > 1) == (level == 1)
