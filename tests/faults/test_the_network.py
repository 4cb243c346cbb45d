"""A bad network between broker and devices: whatever it does, every accepted update counts once."""

from __future__ import annotations

import time

import pytest
from conftest import Undisturbed
from processes import Observer
from proxy import Proxy
from simulation import RUN, Simulation, in_stage_1, recovering
from table import FaultTable

THINK = (0.1, 0.6)


def test_devices_whose_connections_are_cut_lose_nothing(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, attempt: int
) -> None:
    with Proxy(simulation.broker.port, seed=attempt) as proxy, Observer(simulation.broker, RUN) as observer:
        simulation.start_server()
        simulation.start_fleet("--seed", str(attempt), url=proxy.url, think=THINK)
        in_stage_1(observer)
        with recovering(simulation, observer) as seconds:
            assert proxy.cut() == simulation.devices
        outcome = simulation.finish()
    assert outcome.tally["connections"] >= 2 * simulation.devices
    table.add(f"connections cut, {simulation.broker.kind}", outcome.trial(undisturbed(simulation.devices), *seconds))


def test_devices_that_find_nobody_for_a_while_lose_nothing(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, attempt: int
) -> None:
    with Proxy(simulation.broker.port, seed=attempt) as proxy, Observer(simulation.broker, RUN) as observer:
        simulation.start_server()
        simulation.start_fleet("--seed", str(attempt), url=proxy.url, think=THINK)
        in_stage_1(observer)
        with recovering(simulation, observer) as seconds:
            proxy.refuse()
            proxy.cut()
            time.sleep(3)  # the fault is that it lasts
            proxy.admit()
        outcome = simulation.finish()
    table.add(f"no network for 3 s, {simulation.broker.kind}", outcome.trial(undisturbed(6), *seconds))


@pytest.mark.parametrize(
    ("fault", "latency", "repeat", "swap"),
    [
        ("500 ms latency", 0.5, 0.0, 0.0),
        ("5% of publishes repeated", 0.0, 0.05, 0.0),
        ("every publish repeated", 0.0, 1.0, 0.0),
        ("chunks reordered", 0.0, 0.0, 0.5),
        ("all of that", 0.5, 0.05, 0.5),
    ],
)
def test_devices_behind_a_bad_network_lose_nothing(
    simulation: Simulation,
    undisturbed: Undisturbed,
    table: FaultTable,
    attempt: int,
    fault: str,
    latency: float,
    repeat: float,
    swap: float,
    full: bool,
) -> None:
    if not full and fault != "all of that":
        pytest.skip("one by one in the long form only (--full)")
    with Proxy(simulation.broker.port, seed=attempt) as proxy:
        proxy.latency, proxy.repeat, proxy.swap = latency, repeat, swap
        simulation.start_server()
        simulation.start_fleet("--seed", str(attempt), url=proxy.url, think=THINK)
        outcome = simulation.finish()
        assert bool(proxy.repeated) == bool(repeat)
        assert bool(proxy.swapped) == bool(swap)
    table.add(f"{fault}, {simulation.broker.kind}", outcome.trial(undisturbed(simulation.devices)))


def test_devices_that_join_all_at_once_are_all_counted(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, full: bool
) -> None:
    simulation.devices = 300 if full else 60
    simulation.start_server()
    simulation.start_fleet()
    outcome = simulation.finish()
    table.add(
        f"{simulation.devices} devices joining at once, {simulation.broker.kind}",
        outcome.trial(undisturbed(simulation.devices)),
    )
