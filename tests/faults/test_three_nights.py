"""A fleet over three nights, on a real broker and with real devices. The clock on the server's wall is moved."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import Built, with_names
from support.coordinators import plan_for
from support.night_fleet import NightFleet, WallClock
from support.processes import Broker, Observer, wait_until
from support.samples import write_device_photos

from edge_runtime.store import DeviceStore
from edge_runtime.training.stored_model import read_personal_model
from fedfmsl.algorithms.aggregation import Aggregate, ScreenedMean
from fedfmsl.common.hours import Hours
from fedfmsl.protocol.messages import DeviceStatus, Round, Stage
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.storage.operations import Operations
from trainer_server.storage.run_store import RunStore

DEVICES = ("d0", "d1", "d2")
NIGHT = [Stage.GLOBAL, Stage.GLOBAL, Stage.HEAD, Stage.PERSONAL, Stage.EVALUATE]


class Killed(BaseException):
    """A server ends as at a crash."""


def kill_once(patch: pytest.MonkeyPatch, method: str, before: bool) -> None:
    """The server is killed before or after the first call of this method of its store."""
    original, struck = getattr(RunStore, method), []

    def call(store: RunStore, *arguments: Any, **named: Any) -> None:
        if struck:
            return original(store, *arguments, **named)
        struck.append(None)
        if not before:
            original(store, *arguments, **named)
        raise Killed

    patch.setattr(RunStore, method, call)


def poison_once(patch: pytest.MonkeyPatch) -> None:
    """The next global expert is useless, as if most devices were hostile."""
    original, struck = ScreenedMean.aggregate, []

    def aggregate(rule: ScreenedMean, *arguments: Any) -> Aggregate:
        found = original(rule, *arguments)
        if struck:
            return found
        struck.append(None)
        return replace(found, delta=np.random.default_rng(0).normal(0, 30, found.delta.shape))

    patch.setattr(ScreenedMean, "aggregate", aggregate)


@pytest.mark.parametrize(
    ("method", "before"),
    [
        ("begin_session", False),  # the session has begun, and its server has not
        ("begin_session", True),
        ("_sweep", True),  # files of the former session are left
        ("commit", True),  # before the first round
        ("save_checkpoint", True),
    ],
    ids=str,
)
def test_a_fleet_learns_over_three_nights(
    method: str, before: bool, vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Night 1: all train. By day two devices get photos, also of a new class, and one device leaves. Night 2: the
    server is killed while it adds the class. Night 3: the device is back, and a useless global expert is rejected."""
    if not full and (method, before) != ("begin_session", False):
        pytest.skip("the other steps of a class change in the long form only (--full)")
    clock, two = WallClock(datetime(2026, 11, 27, 12)), with_names(vit, ("apple", "kiwi"))
    rules = {"stage1_rounds": 2, "stage2_rounds": 1, "join_timeout": RUN_SECONDS, "round_timeout": RUN_SECONDS}
    plan = plan_for(two, run="nights", schedule=(Hours.parse("22:00-06:00"),), **rules)

    def says(text: str, times: int = 1) -> None:
        wait_until(lambda: fleet.notes.count(text) >= times, f"{times}x {text}", RUN_SECONDS)

    def session() -> str:
        return RunStore(fleet.out).origin.session

    def night(number: int) -> dict[Stage, set[str]]:
        """Its rounds of training, and the devices that took part in them all."""
        gathers = session()
        clock.move_to(23)
        says(ENDS, number)
        ...

    with Processes(tmp_path / "logs") as processes, ExitStack() as ends:
        broker = processes.start_broker()
        fleet = NightFleet(two.bundle, broker, tmp_path, plan.config, clock)
        fleet.patch(monkeypatch, with_models=full)
def test_three_nights(vit: Built, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, two = WallClock(datetime(2026, 11, 27, 12)), with_names(vit, ("apple", "kiwi"))
    schedule = (Hours.parse("22:00-06:00"),)
    plan = plan_for(two, run="nights", stage1_rounds=2, stage2_rounds=1, schedule=schedule, join_timeout=1e6)
    fleet = NightFleet(two.bundle, broker, tmp_path, plan.config, clock)
    fleet.patch(monkeypatch, with_models=False)

    def says(text: str, times: int = 1) -> None:
        wait_until(lambda: fleet.notes.count(text) >= times, f"{times}x {text}")

    def new_photos(name: str, seed: int, **counts: int) -> None:
        """Of a device that is online. Waits until the server knows."""
        since = observer.catch_up()
        write_device_photos(fleet.photos(name), counts, seed)
        observer.wait(DeviceStatus, lambda s: s.device == name and s.new_samples > 0, "new photos", since)

    def stages(session: str) -> list[tuple[Stage, set[str]]]:
        closed = [each for each in RunStore(fleet.out).rounds() if each.round.session == session]
        return [(each.round.stage, set(each.updates)) for each in closed]

    with Observer(broker, "nights") as observer:
        for number, name in enumerate(DEVICES):
            write_device_photos(fleet.photos(name), {"apple": 8, "kiwi": 8}, seed=number)
        server = fleet.start_server()
        for name in DEVICES:
            fleet.start_device(name)
        says("is online", 3)
        says("the run rests: until 2026-11-27 22:00")
        first = RunStore(fleet.out).origin.session
        clock.move_to(23)
        says("the next session begins with new samples")
        assert stages(first) == [(stage, {*DEVICES}) for stage in [Stage.STATISTICS, *NIGHT]]
        says("0 new labelled samples")

        clock.move_to(12)
        says("the run rests: until 2026-11-28 22:00")
        new_photos("d0", 10, apple=12, lemon=8)
        write_device_photos(fleet.photos("d1"), {"lemon": 8}, seed=11)
        fleet.stop_device("d2")
        assert Operations(fleet.out).add(Operation(action=Action.CLASSES, classes=("lemon",)))
        says("1 class is added")
        with monkeypatch.context() as patch:
            kill_once(patch, "begin_session", before=False)
            clock.move_to(23)
            assert isinstance(server.end(), Killed)
        second = RunStore(fleet.out).origin.session
        server = fleet.start_server()
        says("the next session begins with new samples", 2)
        assert RunStore(fleet.out).task().classes == ("apple", "kiwi", "lemon")
        night = [Stage.STATISTICS, *3 * [Stage.GLOBAL], Stage.HEAD, Stage.PERSONAL, Stage.EVALUATE]
        assert [stage for stage, _ in stages(second)] == night
        assert all(updates == {"d0", "d1"} for _, updates in stages(second)[1:])

        clock.move_to(12)
        fleet.start_device("d2")
        new_photos("d0", 12, kiwi=16)
        third = RunStore(fleet.out).origin.session
        poison_once(monkeypatch)
        clock.move_to(23)
        says("the next session begins with new samples", 3)
        print(fleet.notes)
        print(stages(third))
        rejected = RunStore(fleet.out).rejections()
        assert len(rejected) == 1
        assert stages(third)[-1] == (Stage.EVALUATE, {*DEVICES})
        assert [each.round.round for each in RunStore(fleet.out).rounds()] == [
            *range(1, len(RunStore(fleet.out).rounds()) + 1)
        ]
        for name in DEVICES:
            assert len(read_personal_model(DeviceStore(fleet.state(name))).header.held) == 3
            fleet.stop_device(name)
