"""The machine of a real device: a full or failing disk, a power loss, no memory, a clock that jumps. The results of the
run are bit-identical."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from support.fault_records import Row
from support.machine_faults import Clock, failing_calls, journaled_disk, kill_for_memory, small_disk
from support.processes import wait_until
from support.real_run import VICTIM, RealRun
from support.recovery import strike_each
from support.run_oracle import Reference

from fedfmsl.common.exit_codes import DISK

BAD_SECONDS = 1.0  # duration of a fault
DISK_MEGABYTES = 40
DAY = 86_400.0
FULL = "retrying until there is free space"
Undisturbed = Callable[[RealRun], Reference]


@pytest.fixture
def run(real_run: RealRun, full: bool) -> RealRun:
    """A run with a server and two devices."""
    if not full or real_run.federation.broker.kind == "amqtt":
        pytest.skip("in the long form only (--full), on one kind of broker")
    real_run.start_server()
    real_run.start_others()
    return real_run


def test_a_device_with_a_full_disk_waits(run: RealRun, undisturbed_real: Undisturbed, row: Row, times: int) -> None:
    row.name = f"real device's disk full for {BAD_SECONDS:.0f} s, mosquitto"
    with small_disk(run.federation.state(VICTIM), DISK_MEGABYTES) as disk:
        run.start(VICTIM)

        def fill(number: int) -> None:
            disk.fill()
            wait_until(lambda: run.victim.stdout.count(FULL) > number, "it says that its disk is full")
            time.sleep(BAD_SECONDS)
            assert run.victim.running
            disk.free()

        strike_each(run.out, row, times, fill)
        run.check(row, undisturbed_real(run))


@pytest.mark.parametrize(("seconds", "name"), [(0.0, "loses power"), (BAD_SECONDS, "has a disk that fails (EIO)")])
def test_a_device_whose_disk_fails_goes_on_with_what_was_synced(
    run: RealRun, undisturbed_real: Undisturbed, row: Row, times: int, seconds: float, name: str
) -> None:
    row.name = f"real device {name}{f' for {seconds:.0f} s, then starts again' if seconds else ''}, mosquitto"
    with journaled_disk(run.federation.state(VICTIM), DISK_MEGABYTES) as disk:
        run.start(VICTIM)

        def lose(number: int) -> None:
            disk.fail()
            time.sleep(seconds)
            run.victim.send_signal(signal.SIGKILL)
            if (ended := run.victim.wait()).code != -signal.SIGKILL:  # it has noticed by itself
                ended.assert_error(DISK, "the disk fails", "Input/output error")
            disk.repair()
            run.start(VICTIM)

        strike_each(run.out, row, times, lose)
        run.check(row, undisturbed_real(run))


@pytest.mark.needs("strace")
def test_a_device_that_cannot_sync_for_a_moment_goes_on(
    run: RealRun, undisturbed_real: Undisturbed, row: Row, times: int
) -> None:
    row.name = f"real device's writes fail (EIO) for {BAD_SECONDS:.0f} s, mosquitto"
    run.start(VICTIM)

    def fail(number: int) -> None:
        with failing_calls(run.victim.pid, "fsync,fdatasync", "EIO"):
            time.sleep(BAD_SECONDS)
        assert run.victim.running, run.victim.stderr

    strike_each(run.out, row, times, fail)
    run.check(row, undisturbed_real(run))


def test_a_device_that_the_kernel_kills_for_its_memory_goes_on(
    run: RealRun, undisturbed_real: Undisturbed, row: Row, times: int
) -> None:
    row.name = "real device killed by the kernel, out of memory, mosquitto"
    run.start(VICTIM)

    def kill(number: int) -> None:
        kill_for_memory(run.victim.pid)
        run.start(VICTIM)

    strike_each(run.out, row, times, kill)
    run.check(row, undisturbed_real(run))


def test_a_jump_of_a_devices_clock_changes_nothing(
    run: RealRun, undisturbed_real: Undisturbed, row: Row, times: int
) -> None:
    row.name = "real device's clock ±1 day, mosquitto"
    clock = Clock(run.federation.folder)
    run.start(VICTIM, environment=clock.environment)
    strike_each(run.out, row, times, lambda number: clock.jump((1, 0, -1, 0)[number % 4] * DAY))
    run.check(row, undisturbed_real(run))
