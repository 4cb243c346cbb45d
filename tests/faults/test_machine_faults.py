"""A full disk and a clock that jumps on the server's machine, and two devices with one identity."""

from __future__ import annotations

import time

import pytest
from support.fault_table import FaultTable
from support.machine_faults import Clock, small_disk
from support.processes import Observer, wait_until
from support.run_oracle import Undisturbed
from support.simulation import RUN, Simulation, in_stage_1, recovering

from benchmarks.simulated import device_names
from fedfmsl.protocol.messages import Ack, DeviceStatus, Verdict

DELAY = (0.2, 0.8)
FULL_SECONDS = 3.0  # duration of the fault
DISK_MEGABYTES = 40
ACK_SECONDS = 1.0  # until a device sends an update again that the server could not keep
DAY = 86_400.0


def test_a_server_with_a_full_disk_waits_and_loses_nothing(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable
) -> None:
    if simulation.broker.kind == "amqtt":
        pytest.skip("on one kind of broker")
    with small_disk(simulation.out, DISK_MEGABYTES) as disk, Observer(simulation.broker, RUN) as observer:
        server = simulation.start_server()
        simulation.start_fleet("--ack-timeout", str(ACK_SECONDS), delay=DELAY)
        in_stage_1(observer)
        with recovering(simulation, observer) as seconds:
            disk.fill()
            wait_until(lambda: "the run waits for it" in server.stdout, "the server says that its disk is full")
            time.sleep(FULL_SECONDS)
            assert server.running
            disk.free()
        trial = simulation.finish().trial(undisturbed(simulation.devices), *seconds)
    table.add(f"server's disk full, {simulation.broker.kind}", trial)


@pytest.mark.parametrize("days", [1, -1])
def test_a_jump_of_the_servers_clock_closes_no_round(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, full: bool, days: int
) -> None:
    if not full or simulation.broker.kind == "amqtt":
        pytest.skip("in the long form only (--full), on one kind of broker")
    clock = Clock(simulation.folder)
    with Observer(simulation.broker, RUN) as observer:
        simulation.start_server(environment=clock.environment)
        simulation.start_fleet(delay=DELAY)
        in_stage_1(observer)
        with recovering(simulation, observer) as seconds:
            clock.jump(days * DAY)
        outcome = simulation.finish()
    trial = outcome.trial(undisturbed(simulation.devices), *seconds)
    table.add(f"server's clock {days:+} day, {simulation.broker.kind}", trial)


def test_of_two_devices_with_one_identity_the_older_exits_and_no_update_counts_twice(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, full: bool
) -> None:
    if not full:
        pytest.skip("with simulated devices in the long form only (--full); with real ones in tests/integration")
    name = device_names(1)[0]
    with Observer(simulation.broker, RUN) as observer:
        simulation.start_server()
        simulation.start_fleet(delay=DELAY, first=1, devices=simulation.devices - 1)
        older = simulation.start_fleet(delay=DELAY, devices=1)
        in_stage_1(observer)
        before = {m.instance for m in observer.seen if isinstance(m, DeviceStatus) and m.device == name}
        since, struck = observer.catch_up(), time.monotonic()
        simulation.start_fleet(delay=DELAY, devices=1)
        observer.wait(DeviceStatus, lambda s: s.device == name and s.instance not in before, "the newer device", since)
        ended = older.wait()
        assert f"duplicate device name '{name}'" in ended.stderr
        counts = (Verdict.ACCEPTED, Verdict.DUPLICATE)
        observer.wait(Ack, lambda a: a.device == name and a.verdict in counts, "the newer device's update", since)
        seconds = time.monotonic() - struck
        outcome = simulation.finish(expelled=[older])
    trial = outcome.trial(undisturbed(simulation.devices), seconds)
    table.add(f"two devices with one identity, {simulation.broker.kind}", trial)
