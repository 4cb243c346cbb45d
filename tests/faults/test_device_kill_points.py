"""A real device is killed at each of its states or has a full disk. The results of the run are bit-identical."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.brokers import RestartableBroker
from support.bundles import build
from support.fault_table import FaultTable, Trial
from support.kill_point import launcher
from support.machine_faults import small_disk
from support.processes import Federation, Observer, Processes, wait_until
from support.run_oracle import Reference, examine, reference
from support.samples import CLASSES, write_device_photos
from support.simulation import ROUND_TIMEOUT, trial_of
from support.tools import find_tool

from fedfmsl.protocol.messages import Ack, Round, Stage, Verdict

RUN = "real"
VICTIM, OTHERS = "device-0", ("device-1", "device-2")
MANY = 2000  # classes, so that an update is more than one chunk
FULL_SECONDS = 2.0  # duration of the fault
DISK_MEGABYTES = 40
OUTBOX, GLOBALS = "edge_runtime.store.outbox:Outbox", "edge_runtime.store.global_store:GlobalStore"
HALF_SENT = "when its update is half sent"
Kill = tuple[str, str, str, int]  # name in the table, and arguments of `kill_point.arm`
KILLS: list[Kill] = [
    ("before its update is in the outbox", f"{OUTBOX}.write", "before", 1),
    ("when its update is in the outbox", f"{OUTBOX}.write", "after", 1),
    (HALF_SENT, "edge_runtime.daemon.update_sender:Retransmissions.sent", "before", 1),
    ("after the ack, before it is stored", f"{OUTBOX}.acknowledge", "before", 1),
    ("after the ack is stored, before the update is removed", "edge_runtime.store.outbox:write_atomically", "after", 1),
    ("before globals are kept", f"{GLOBALS}.write", "before", 1),
    ("when globals are kept", f"{GLOBALS}.write", "after", 1),
    ("while training", "edge_runtime.engines.step_graph:StepGraphEngine.step", "before", 3),
    ("before the residual is saved", "edge_runtime.training.updates:save_residual", "before", 1),
    ("when the residual is saved", "edge_runtime.training.updates:save_residual", "after", 1),
    ("before the local expert is saved", "edge_runtime.training.local_expert:LocalExpert.save", "before", 1),
    ("when the local expert is saved", "edge_runtime.training.local_expert:LocalExpert.save", "after", 1),
    ("after the ack and the update's removal", f"{OUTBOX}.acknowledge", "after", 1),
]
SHORT = {HALF_SENT, "when the residual is saved", "when the local expert is saved"}


@dataclass
class Real:
    """A run with three real devices."""

    federation: Federation
    observer: Observer

    def start_server(self) -> None:
        self.federation.start_server(
            *("--stage1-rounds", "2", "--stage2-rounds", "2", "--encoding", "int8", "--audit"),
            *("--round-timeout", str(ROUND_TIMEOUT)),
            *("--head", "class-means", "--head-sums", "features"),  # the first update is several chunks
        )

    def start(self, device: str, launcher: Sequence[str] = ("-m",)) -> None:
        again = self.federation.state(device).exists()
        self.federation.start_device(device, "--bundle", str(self.federation.bundle), again=again, launcher=launcher)

    def finish(self) -> None:
        for process in (self.federation.processes.started["server"], *self.federation.devices.values()):
            ended = process.wait()
            assert ended.code == 0, (process.log.name, ended.code, ended.stderr[-2000:])

    def trial(self, undisturbed: Reference, recovery: float | None, times: int = 1) -> Trial:
        self.observer.catch_up()
        acknowledged = {
            (ack.round, ack.device)
            for ack in self.observer.seen
            if isinstance(ack, Ack) and ack.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE)
        }
        return trial_of(examine(self.federation.server_folder, acknowledged, undisturbed), recovery, times)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("devices")
    counts = [{"apple": 10, "kiwi": 10}, {"kiwi": 10, "lemon": 8}, dict.fromkeys(CLASSES, 6)]
    given = enumerate(zip((VICTIM, *OTHERS), counts, strict=True))
    return {name: write_device_photos(folder / name, each, seed) for seed, (name, each) in given}


@pytest.fixture(scope="module")
def wide(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    classes = (*CLASSES, *(f"class-{index}" for index in range(MANY)))
    return build(vit_folder, tmp_path_factory.mktemp("bundles") / "wide", levels=1, classes=classes).bundle.root


@pytest.fixture(scope="module")
def undisturbed_real(wide: Path, photos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("undisturbed-real")
    with Processes(folder / "logs") as processes:
        broker = RestartableBroker(processes, folder, "mosquitto" if find_tool("mosquitto") else "amqtt")
        with Observer(broker, RUN) as observer:
            real = Real(Federation(RUN, broker, wide, photos, folder, processes), observer)
            real.start_server()
            for name in photos:
                real.start(name)
            real.finish()
    return reference(real.federation.server_folder)


@pytest.fixture
def federation(kind: str, wide: Path, photos: dict[str, Path], processes: Processes, tmp_path: Path) -> Federation:
    return Federation(RUN, RestartableBroker(processes, tmp_path, kind), wide, photos, tmp_path, processes)


def test_a_device_killed_at_each_of_its_states_gives_the_same_run(
    federation: Federation, kind: str, undisturbed_real: Reference, table: FaultTable, full: bool
) -> None:
    if not full and kind == "amqtt":
        pytest.skip("on amqtt in the long form only (--full)")
    kills = [kill for kill in KILLS if full or kill[0] in SHORT]
    with Observer(federation.broker, RUN) as observer:
        real = Real(federation, observer)
        real.start_server()
        for name in OTHERS:
            real.start(name)
        for state, point, when, call in kills:
            real.start(VICTIM, launcher(point, when, call))
            ended = federation.devices[VICTIM].wait()
            assert ended.code == -signal.SIGKILL, (state, ended.stdout[-1000:], ended.stderr[-1000:])
            if state == HALF_SENT and kind == "mosquitto":  # amqtt may not have passed it on
                uploads = federation.server_folder / "uploads"
                wait_until(lambda: any(uploads.iterdir()), "the server has a part of the update")  # noqa: B023
            observer.catch_up()
        restarted, since = time.monotonic(), len(observer.seen)
        real.start(VICTIM)
        observer.wait(Ack, lambda a: a.device == VICTIM, "the victim's update after its last return", since)
        recovery = time.monotonic() - restarted
        real.finish()
        trial = real.trial(undisturbed_real, recovery, len(kills))
    assert trial.compared == trial.recomputed
    table.add(f"real device SIGKILL at {len(kills)} states, {kind}", trial)


def test_a_device_with_a_full_disk_waits_and_gives_the_same_run(
    federation: Federation, kind: str, undisturbed_real: Reference, table: FaultTable, full: bool
) -> None:
    if not full:
        pytest.skip("in the long form only (--full); another such test is in tests/integration")
    with small_disk(federation.state(VICTIM), DISK_MEGABYTES) as disk, Observer(federation.broker, RUN) as observer:
        real = Real(federation, observer)
        real.start_server()
        (federation.state(VICTIM) / "identity").write_text(VICTIM)
        for name in federation.photos:
            real.start(name)
        begun = observer.wait(Round, lambda r: r.stage is Stage.GLOBAL, "stage 1")
        victim = federation.devices[VICTIM]
        victim.pause()  # or it would be done with this round before its disk is full
        disk.fill()
        victim.resume()
        wait_until(
            lambda: "retrying until there is free space" in victim.stdout, "the device says that its disk is full"
        )
        time.sleep(FULL_SECONDS)
        assert victim.running
        disk.free()
        repaired, since = time.monotonic(), observer.catch_up()
        observer.wait(Ack, lambda a: a.device == VICTIM and a.round >= begun.round, "the victim's update", since)
        recovery = time.monotonic() - repaired
        real.finish()
        trial = real.trial(undisturbed_real, recovery)
    assert trial.compared == trial.recomputed
    table.add(f"real device's disk full, {kind}", trial)
