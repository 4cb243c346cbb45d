"""A fleet over three nights, on a real broker and with real devices. The server's wall clock is moved."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import Built, with_names
from support.coordinators import plan_for
from support.night_fleet import Killed, NightFleet, WallClock
from support.processes import RUN_SECONDS, Observer, Processes, wait_until
from support.samples import write_device_photos

from edge_runtime.store import DeviceStore
from edge_runtime.training.stored_model import read_personal_model
from fedfmsl.algorithms.aggregation import Aggregate, ScreenedMean
from fedfmsl.common.hours import Hours
from fedfmsl.protocol.messages import DeviceStatus, Stage
from trainer_server.coordinator.operator import Action, Operation
from trainer_server.storage.operations import Operations
from trainer_server.storage.run_status import sizes_of
from trainer_server.storage.run_store import RunStore

DEVICES = ["d0", "d1", "d2"]
ENDS = "the next session begins with new samples"
KILLS = [  # at a call of the store: before or after it
    ("begin_session", "after"),
    ("begin_session", "before"),
    ("_sweep", "before"),
    ("commit", "before"),
    ("save_checkpoint", "before"),
]


def kill_once(patch: pytest.MonkeyPatch, method: str, moment: str) -> None:
    original, struck = getattr(RunStore, method), []

    def call(store: RunStore, *arguments: Any, **named: Any) -> None:
        if struck:
            return original(store, *arguments, **named)
        struck.append(None)
        if moment == "after":
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


@pytest.mark.parametrize(("method", "moment"), KILLS)
def test_a_fleet_learns_over_three_nights(
    method: str, moment: str, vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Night 1: all train. By day two devices get photos of a new class, and the third one leaves. Night 2: the server
    is killed while it adds the class. Night 3: the device is back, and a useless global expert is rejected."""
    if not full and (method, moment) != KILLS[0]:
        pytest.skip("the other steps of a class change in the long form only (--full)")
    clock, two = WallClock(datetime(2026, 11, 27, 12)), with_names(vit, ("apple", "kiwi"))
    rules = {"stage1_rounds": 2, "stage2_rounds": 1, "join_timeout": RUN_SECONDS, "round_timeout": RUN_SECONDS}
    plan = plan_for(two, run="nights", schedule=(Hours.parse("22:00-06:00"),), **rules)
    with Processes(tmp_path / "logs") as processes:
        fleet = NightFleet(two.bundle, processes.start_broker(), tmp_path, plan.config, clock)
        fleet.patch(monkeypatch, with_models=full)

        def rounds(session: str) -> list[tuple[Stage, list[str]]]:
            closed = [each for each in RunStore(fleet.out).rounds.all() if each.round.session == session]
            return [(each.round.stage, sorted(each.updates)) for each in closed]

        def session() -> str:
            return RunStore(fleet.out).origin.session

        with Observer(fleet.broker, "nights") as observer:
            for number, name in enumerate(DEVICES):
                write_device_photos(fleet.photos(name), {"apple": 8, "kiwi": 8}, seed=number)
            fleet.start_server()
            for name in DEVICES:
                fleet.start_device(name)
            fleet.says("is online", 3)
            fleet.says("the run rests: until 2026-11-27 22:00 (--schedule 22:00-06:00)")
            first = session()
            clock.move_to(23)
            fleet.says(ENDS)
            fleet.says("fewer than --min-new 1")
            night = [Stage.GLOBAL, Stage.GLOBAL, Stage.HEAD, Stage.PERSONAL, Stage.EVALUATE]
            assert rounds(first) == [(stage, DEVICES) for stage in [Stage.STATISTICS, *night]]

            clock.move_to(12)
            fleet.says("the run rests: until 2026-11-28 22:00")
            since = observer.catch_up()
            for name in ("d0", "d1"):
                write_device_photos(fleet.photos(name), {"apple": 16, "lemon": 8}, seed=10)
                observer.wait(
                    DeviceStatus,
                    lambda s, name=name: s.device == name and s.proposed == {"lemon": 8} and s.new_samples > 0,
                    f"{name} has new photos of apples, and proposes lemons",
                    since,
                    RUN_SECONDS,
                )
            fleet.stop_device("d2")
            assert Operations(fleet.out).add(Operation(action=Action.CLASSES, classes=("lemon",)))
            fleet.says("1 class is added")
            with monkeypatch.context() as patch:
                kill_once(patch, method, moment)
                clock.move_to(23)
                assert isinstance(fleet.server.end(), Killed)
            fleet.start_server()
            fleet.says(ENDS, 2)
            second = next(
                closed.round.session for closed in RunStore(fleet.out).rounds.all() if closed.round.round == 7
            )
            longer = [Stage.STATISTICS, Stage.GLOBAL, *night]
            assert rounds(second) == [(stage, ["d0", "d1"]) for stage in longer]
            task = RunStore(fleet.out).task()
            assert (task.version, task.classes) == (2, ("apple", "kiwi", "lemon"))

            clock.move_to(12)
            fleet.start_device("d2")
            wait_until(lambda: fleet.task_of("d2") == task.sha256, "d2 has caught up", RUN_SECONDS)
            since = observer.catch_up()
            for name, photos in (("d2", {"apple": 8}), ("d0", {"kiwi": 24})):
                write_device_photos(fleet.photos(name), photos, seed=20)
                observer.wait(
                    DeviceStatus,
                    lambda s, name=name: s.device == name and s.online and not s.paused and s.new_samples > 0,
                    f"{name} is online, and has new photos",
                    since,
                    RUN_SECONDS,
                )
            poison_once(monkeypatch)
            third = session()
            clock.move_to(23)
            fleet.says(ENDS, 3)
            assert "the candidate of round 14 is rejected: 3 of 3 devices lose more than 0.3 nats" in fleet.notes
            assert rounds(third) == [(stage, DEVICES) for stage in [Stage.GLOBAL, *night]]
            numbers = [closed.round.round for closed in RunStore(fleet.out).rounds.all()]
            assert numbers == list(range(1, 6 + 7 + 6 + 1))
            fleet.stop_server()
            for name in DEVICES:
                fleet.stop_device(name)
                header = read_personal_model(DeviceStore(fleet.state(name))).header
                assert (header.task, len(header.held)) == (task.sha256, 3)


def test_many_nights_leave_as_much_as_a_few(
    vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """Memory, threads, open files and disk of a server and a device, in one process."""
    if not full:
        pytest.skip("forty nights in the long form only (--full)")
    rules = {"stage1_rounds": 1, "stage2_rounds": 1, "keep_rounds": 20, "round_timeout": RUN_SECONDS}
    plan = plan_for(vit, 1, run="many", schedule=(Hours.parse("22:00-06:00"),), join_timeout=RUN_SECONDS, **rules)
    with Processes(tmp_path / "logs") as processes:
        broker, clock = processes.start_broker(), WallClock(datetime(2026, 11, 27, 12))
        fleet = NightFleet(vit.bundle, broker, tmp_path, plan.config, clock)
        fleet.patch(monkeypatch, with_models=False)
        write_device_photos(fleet.photos("d"), {"apple": 8, "kiwi": 8}, seed=0)
        fleet.start_server()
        fleet.start_device("d")
        fleet.says("is online")
        uses = {}
        for night in range(1, 41):
            clock.move_to(23)
            fleet.says(ENDS, night)
            clock.move_to(12)
            write_device_photos(fleet.photos("d"), {"apple": 6}, seed=night)
            fleet.says("the run rests: until", night + 1)
            gc.collect()
            files, disk = len([*Path("/proc/self/fd").iterdir()]), sum(sizes_of(RunStore(fleet.out)).values())
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            uses[night] = {"memory": memory, "threads": threading.active_count(), "files": files, "disk": disk}
        for what, bound in {"memory": 20e6, "threads": 1, "files": 6, "disk": 1e6}.items():
            assert uses[40][what] < uses[24][what] + bound, uses
        fleet.stop_server()
        fleet.stop_device("d")
