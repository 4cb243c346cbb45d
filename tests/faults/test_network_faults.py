"""A bad network between the broker and the devices or the server: every accepted update counts once."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.fault_table import FaultTable
from support.keepalive_server import launcher
from support.network_proxy import Proxy
from support.processes import Observer
from support.run_oracle import Undisturbed
from support.simulation import RUN, Simulation, in_stage_1, recovering

DELAY = (0.1, 0.4)
KEEPALIVE_SECONDS = 1
AWAY_SECONDS = 3.0  # duration of the fault


def cut(proxy: Proxy) -> int:
    return proxy.cut()


def go_away(proxy: Proxy) -> int:
    proxy.refuse()
    connections = proxy.cut()
    time.sleep(AWAY_SECONDS)
    proxy.admit()
    return connections


def half_open(proxy: Proxy) -> int:
    return proxy.half_open()


@pytest.mark.parametrize(
    ("fault", "strike", "sides"),
    [
        ("connections cut", cut, {"devices"}),
        ("connections cut", cut, {"server"}),
        (f"no network for {AWAY_SECONDS:.0f} s", go_away, {"devices", "server"}),
        (f"half-open connections, a ping every {KEEPALIVE_SECONDS} s", half_open, {"devices", "server"}),
    ],
)
def test_failing_connections_lose_no_update(
    simulation: Simulation,
    undisturbed: Undisturbed,
    table: FaultTable,
    full: bool,
    fault: str,
    strike: Callable[[Proxy], int],
    sides: set[str],
) -> None:
    if not full and (strike is not half_open or simulation.broker.kind == "amqtt"):
        pytest.skip("in the long form only (--full); tests/integration restarts the broker, which cuts all connections")
    if strike is half_open and simulation.broker.kind == "amqtt":
        pytest.skip("on one kind of broker")
    # a half-open connection is noticed when a ping is not answered
    ping = strike is half_open
    struck = ("server" in sides) + simulation.devices * ("devices" in sides)
    with Proxy(simulation.broker.port) as proxy, Observer(simulation.broker, RUN) as observer:
        simulation.start_server(
            url=proxy.url if "server" in sides else None, launcher=launcher(KEEPALIVE_SECONDS) if ping else ("-m",)
        )
        simulation.start_fleet(
            *(("--keepalive", str(KEEPALIVE_SECONDS)) if ping else ()),
            url=proxy.url if "devices" in sides else None,
            delay=DELAY,
        )
        in_stage_1(observer)
        with recovering(simulation, observer) as seconds:
            assert strike(proxy) == struck
        outcome = simulation.finish()
        assert proxy.accepted >= 2 * struck
    name = f"{fault}, {' and '.join(sorted(sides))}, {simulation.broker.kind}"
    table.add(name, outcome.trial(undisturbed(simulation.devices), *seconds))


@pytest.mark.parametrize(
    ("fault", "latency", "repeat", "swap"),
    [
        ("500 ms latency", 0.5, 0.0, 0.0),
        ("5% of publishes repeated", 0.0, 0.05, 0.0),
        ("chunks reordered", 0.0, 0.0, 0.5),
        ("all of that", 0.5, 0.05, 0.5),
    ],
)
def test_latency_repetition_and_reordering_lose_no_update(
    simulation: Simulation,
    undisturbed: Undisturbed,
    table: FaultTable,
    fault: str,
    latency: float,
    repeat: float,
    swap: float,
    full: bool,
) -> None:
    """In both directions: updates, acknowledgements and globals."""
    amqtt = simulation.broker.kind == "amqtt"
    if (not full and (fault != "chunks reordered" or amqtt)) or (fault == "500 ms latency" and amqtt):
        pytest.skip("one by one in the long form only (--full); latency alone on one kind of broker")
    with Proxy(simulation.broker.port, seed=1) as proxy:
        proxy.latency, proxy.repeat, proxy.swap = latency, repeat, swap
        simulation.start_server(url=proxy.url)
        simulation.start_fleet(url=proxy.url, delay=DELAY)
        outcome = simulation.finish()
        assert bool(proxy.repeated) == bool(repeat)
        assert bool(proxy.swapped) == bool(swap)
    table.add(f"{fault}, devices and server, {simulation.broker.kind}", outcome.trial(undisturbed(simulation.devices)))


def test_devices_that_join_at_once_all_take_part(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, full: bool
) -> None:
    if not full:
        pytest.skip("in the long form only (--full); more devices join at once in test_server_memory")
    simulation.devices = 300
    simulation.start_server()
    simulation.start_fleet()
    outcome = simulation.finish()
    table.add(
        f"{simulation.devices} devices joining at once, {simulation.broker.kind}",
        outcome.trial(undisturbed(simulation.devices)),
    )
