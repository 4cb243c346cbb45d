"""The server's machine: a full or failing disk, a power loss, no memory, no descriptors, a clock that jumps. And two
devices with one identity."""

from __future__ import annotations

import time

import pytest
from support.fault_records import Row
from support.held_start import launcher
from support.machine_faults import Clock, failing_calls, journaled_disk, kill_for_memory, no_descriptors, small_disk
from support.processes import Observer, Process, wait_until
from support.recovery import strike_each
from support.run_oracle import Undisturbed
from support.simulation import RUN, Simulation

from benchmarks.simulated import device_names
from fedfmsl.protocol.messages import DeviceStatus

DELAY = (0.1, 0.4)
BAD_SECONDS = 1.0  # duration of a fault
DISK_MEGABYTES = 240
ACK_SECONDS = 1.0  # until a device sends an update again that the server could not keep
DAY = 86_400.0


@pytest.fixture
def on_mosquitto(simulation: Simulation, full: bool) -> Simulation:
    if not full or simulation.broker.kind == "amqtt":
        pytest.skip("in the long form only (--full), on one kind of broker")
    return simulation


def start(simulation: Simulation) -> Process:
    server = simulation.start_server()
    simulation.start_fleet("--ack-timeout", str(ACK_SECONDS), delay=DELAY)
    return server


def test_a_server_with_a_full_disk_waits_and_loses_nothing(
    simulation: Simulation, undisturbed: Undisturbed, row: Row, times: int
) -> None:
    if simulation.broker.kind == "amqtt":
        pytest.skip("on one kind of broker")
    row.name = f"server's disk full for {BAD_SECONDS:.0f} s, mosquitto"
    with small_disk(simulation.out, DISK_MEGABYTES) as disk:
        server = start(simulation)

        def fill(number: int) -> None:
            disk.fill()
            wait_until(
                lambda: server.stdout.count("the run waits for it") > number, "the server says that its disk is full"
            )
            time.sleep(BAD_SECONDS)
            assert server.running
            disk.free()

        strike_each(simulation.out, row, times, fill)
        simulation.check(row, undisturbed)


@pytest.mark.parametrize(("seconds", "name"), [(0.0, "loses power"), (BAD_SECONDS, "has a disk that fails (EIO)")])
def test_a_server_whose_disk_fails_has_everything_that_it_acknowledged(
    on_mosquitto: Simulation, undisturbed: Undisturbed, row: Row, times: int, seconds: float, name: str
) -> None:
    """What was not synced is lost. With `seconds` the server meets the failed disk before it is killed."""
    row.name = f"server {name}{f' for {seconds:.0f} s, then starts again' if seconds else ''}, mosquitto"
    simulation = on_mosquitto
    with journaled_disk(simulation.out, DISK_MEGABYTES) as disk:
        start(simulation)

        def lose(number: int) -> None:
            disk.fail()
            time.sleep(seconds)
            simulation.servers[-1].kill()
            disk.repair()
            simulation.start_server()

        strike_each(simulation.out, row, times, lose)
        simulation.check(row, undisturbed)


@pytest.mark.needs("strace")
@pytest.mark.parametrize(
    ("calls", "what"), [("pwrite64,fsync,fdatasync", "writes fail (EIO)"), ("pread64", "reads fail (EIO)")]
)
def test_a_server_whose_database_cannot_be_used_for_a_moment_goes_on(
    on_mosquitto: Simulation, undisturbed: Undisturbed, row: Row, times: int, calls: str, what: str
) -> None:
    row.name = f"server's {what} for {BAD_SECONDS:.0f} s, mosquitto"
    server = start(on_mosquitto)

    def fail(number: int) -> None:
        with failing_calls(server.pid, calls, "EIO"):
            time.sleep(BAD_SECONDS)
        assert server.running, server.stderr

    strike_each(on_mosquitto.out, row, times, fail)
    on_mosquitto.check(row, undisturbed)


def test_a_server_that_the_kernel_kills_for_its_memory_loses_nothing(
    on_mosquitto: Simulation, undisturbed: Undisturbed, row: Row, times: int
) -> None:
    row.name = "server killed by the kernel, out of memory, mosquitto"
    start(on_mosquitto)

    def kill(number: int) -> None:
        kill_for_memory(on_mosquitto.servers[-1].pid)
        on_mosquitto.start_server()

    strike_each(on_mosquitto.out, row, times, kill)
    on_mosquitto.check(row, undisturbed)


def test_a_server_without_descriptors_waits_and_loses_nothing(
    on_mosquitto: Simulation, undisturbed: Undisturbed, row: Row, times: int
) -> None:
    row.name = f"server out of descriptors for {BAD_SECONDS:.0f} s (EMFILE), mosquitto"
    server = start(on_mosquitto)

    def exhaust(number: int) -> None:
        with no_descriptors(server.pid):
            time.sleep(BAD_SECONDS)
        assert server.running, server.stderr

    strike_each(on_mosquitto.out, row, times, exhaust)
    on_mosquitto.check(row, undisturbed)


def test_a_jump_of_the_servers_clock_closes_no_round(
    on_mosquitto: Simulation, undisturbed: Undisturbed, row: Row, times: int
) -> None:
    row.name = "server's clock ±1 day, mosquitto"
    clock = Clock(on_mosquitto.folder)
    on_mosquitto.start_server(environment=clock.environment)
    on_mosquitto.start_fleet(delay=DELAY)
    strike_each(on_mosquitto.out, row, times, lambda number: clock.jump((1, 0, -1, 0)[number % 4] * DAY))
    on_mosquitto.check(row, undisturbed)


def test_of_two_devices_with_one_identity_the_older_exits_and_no_update_counts_twice(
    simulation: Simulation, undisturbed: Undisturbed, row: Row, times: int, full: bool
) -> None:
    if not full:
        pytest.skip("with simulated devices in the long form only (--full); with real ones in tests/integration")
    row.name = f"two devices with one identity, {simulation.broker.kind}"
    name = device_names(1)[0]
    with Observer(simulation.broker, RUN) as observer:
        simulation.start_server()
        simulation.start_fleet(delay=DELAY, first=1, devices=simulation.devices - 1)
        go = [simulation.folder / f"go-{number}" for number in range(times + 1)]
        fleets = [simulation.start_fleet(delay=DELAY, devices=1, launcher=launcher(file)) for file in go]
        go[0].touch()

        def start_another(number: int) -> None:
            since = observer.catch_up()
            before = {m.instance for m in observer.seen if isinstance(m, DeviceStatus) and m.device == name}
            go[number + 1].touch()
            observer.wait(
                DeviceStatus, lambda s: s.device == name and s.instance not in before, "the newer device", since
            )
            assert f"duplicate device name '{name}'" in fleets[number].wait().stderr

        strike_each(simulation.out, row, times, start_another)
        simulation.check(row, undisturbed, expelled=fleets[:-1])
