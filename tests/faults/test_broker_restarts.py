"""The broker restarts in the middle of a round, with its messages and sessions or without, or lacks something."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.brokers import RestartableBroker
from support.fault_records import Row
from support.machine_faults import no_descriptors, small_disk
from support.network_proxy import Proxy
from support.processes import Processes
from support.recovery import strike_each
from support.run_oracle import Undisturbed
from support.simulation import Simulation
from support.tools import require_tool

from fedfmsl.protocol.task_bundle import TaskBundle

DELAY = (0.1, 0.4)
AWAY_SECONDS = 1.0  # duration of a fault
QUEUED_MESSAGES = 10
DISK_MEGABYTES = 8


@pytest.fixture(autouse=True)
def long_form_only(full: bool) -> None:
    if not full:
        pytest.skip("with simulated devices in the long form only (--full); with real ones in tests/integration")


@pytest.mark.parametrize(
    ("kind", "persistent", "end"),
    [
        ("mosquitto", False, "kill"),
        ("mosquitto", False, "stop"),
        ("mosquitto", True, "kill"),
        ("mosquitto", True, "stop"),
        ("amqtt", False, "kill"),  # on SIGTERM it drops one client after another, and the run may finish before
    ],
)
def test_a_broker_restart_in_a_round_loses_no_update(
    layout: TaskBundle,
    processes: Processes,
    tmp_path: Path,
    undisturbed: Undisturbed,
    row: Row,
    times: int,
    kind: str,
    persistent: bool,
    end: str,
) -> None:
    if kind == "mosquitto":
        require_tool("mosquitto")
    memory = {"amqtt": "", "mosquitto": ", persistent" if persistent else ", forgetful"}[kind]
    row.name = f"broker away for {AWAY_SECONDS:.0f} s ({'SIGKILL' if end == 'kill' else 'SIGTERM'}{memory}), {kind}"
    broker = RestartableBroker(processes, tmp_path, kind, persistent, autosave=20)
    simulation = Simulation.for_faults(times, processes, broker, layout, tmp_path)

    def restart(number: int) -> None:
        (broker.kill if end == "kill" else broker.stop)()
        time.sleep(AWAY_SECONDS)
        broker.start()

    simulation.start_server()
    simulation.start_fleet(delay=DELAY)
    strike_each(simulation.out, row, times, restart)
    simulation.check(row, undisturbed)


@pytest.mark.needs("mosquitto")
def test_a_broker_with_a_full_queue_drops_messages_and_no_update_is_lost(
    layout: TaskBundle, processes: Processes, tmp_path: Path, undisturbed: Undisturbed, row: Row, times: int
) -> None:
    row.name = f"broker drops messages: queue of {QUEUED_MESSAGES}, server stopped for {AWAY_SECONDS:.0f} s, mosquitto"
    lines = ("allow_anonymous true", f"max_queued_messages {QUEUED_MESSAGES}", "max_inflight_messages 5")
    broker = RestartableBroker(processes, tmp_path, lines=lines)
    simulation = Simulation.for_faults(times, processes, broker, layout, tmp_path)

    def stop(number: int) -> None:
        server.pause()
        time.sleep(AWAY_SECONDS)
        server.resume()

    server = simulation.start_server()
    simulation.start_fleet(delay=DELAY)
    strike_each(simulation.out, row, times, stop)
    simulation.check(row, undisturbed)


@pytest.mark.needs("mosquitto")
def test_a_broker_with_a_full_disk_loses_no_update(
    layout: TaskBundle, processes: Processes, tmp_path: Path, undisturbed: Undisturbed, row: Row, times: int
) -> None:
    row.name = f"broker's disk full for {AWAY_SECONDS:.0f} s, then SIGKILL, mosquitto"
    with small_disk(tmp_path / "mosquitto", DISK_MEGABYTES) as disk:
        broker = RestartableBroker(processes, tmp_path, persistent=True, autosave=20)
        simulation = Simulation.for_faults(times, processes, broker, layout, tmp_path)

        def fill(number: int) -> None:
            disk.fill()
            time.sleep(AWAY_SECONDS)
            disk.free()
            broker.kill()
            broker.start()

        simulation.start_server()
        simulation.start_fleet(delay=DELAY)
        strike_each(simulation.out, row, times, fill)
        simulation.check(row, undisturbed)


@pytest.mark.needs("mosquitto")
def test_a_broker_without_descriptors_loses_no_update(
    layout: TaskBundle, processes: Processes, tmp_path: Path, undisturbed: Undisturbed, row: Row, times: int
) -> None:
    row.name = f"connections cut, broker out of descriptors for {AWAY_SECONDS:.0f} s (EMFILE), mosquitto"
    broker = RestartableBroker(processes, tmp_path)
    simulation = Simulation.for_faults(times, processes, broker, layout, tmp_path)
    with Proxy(broker.port) as proxy:

        def cut(number: int) -> None:
            with no_descriptors(broker.pid):
                proxy.cut()
                time.sleep(AWAY_SECONDS)

        simulation.start_server(url=proxy.url)
        simulation.start_fleet(url=proxy.url, delay=DELAY)
        strike_each(simulation.out, row, times, cut)
        simulation.check(row, undisturbed)
