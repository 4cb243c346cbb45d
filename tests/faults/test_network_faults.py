"""A bad network between the broker and the devices or the server: every accepted update counts once."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.brokers import RestartableBroker
from support.fault_records import Row
from support.fault_table import NO_FAULT
from support.keepalive_server import launcher
from support.network_proxy import Proxy
from support.network_space import NetworkSpace
from support.processes import Processes
from support.recovery import Recovery, strike_each
from support.run_oracle import Undisturbed
from support.simulation import Simulation

from fedfmsl.protocol.task_bundle import TaskBundle

DELAY = (0.1, 0.4)
KEEPALIVE_SECONDS = 1
AWAY_SECONDS = 1.0  # duration of a fault without a network
LONGER = 3  # times as many rounds: while the network is bad, rounds close
BAD_SECONDS = 3.0  # duration of a fault of a network that works
JOINING = 100  # devices


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


def nothing(proxy: Proxy) -> int:
    return 0


@pytest.mark.parametrize(
    ("fault", "strike", "sides"),
    [
        (NO_FAULT, nothing, {"devices", "server"}),
        ("connections cut", cut, {"devices"}),
        ("connections cut", cut, {"server"}),
        (f"no network for {AWAY_SECONDS:.0f} s", go_away, {"devices", "server"}),
        (f"half-open connections, a ping every {KEEPALIVE_SECONDS} s", half_open, {"devices", "server"}),
    ],
)
def test_failing_connections_lose_no_update(
    simulation: Simulation,
    undisturbed: Undisturbed,
    row: Row,
    times: int,
    full: bool,
    fault: str,
    strike: Callable[[Proxy], int],
    sides: set[str],
) -> None:
    if not full and (strike is not half_open or simulation.broker.kind == "amqtt"):
        pytest.skip("in the long form only (--full); tests/integration restarts the broker, which cuts all connections")
    if strike in (half_open, nothing) and simulation.broker.kind == "amqtt":
        pytest.skip("on one kind of broker")
    row.name = fault if strike is nothing else f"{fault}, {' and '.join(sorted(sides))}, {simulation.broker.kind}"
    # a half-open connection is noticed when a ping is not answered
    ping = strike is half_open
    struck = 0 if strike is nothing else ("server" in sides) + simulation.devices * ("devices" in sides)
    with Proxy(simulation.broker.port) as proxy:
        simulation.start_server(
            url=proxy.url if "server" in sides else None, launcher=launcher(KEEPALIVE_SECONDS) if ping else ("-m",)
        )
        simulation.start_fleet(
            *(("--keepalive", str(KEEPALIVE_SECONDS)) if ping else ()),
            url=proxy.url if "devices" in sides else None,
            delay=DELAY,
        )
        strike_each(simulation.out, row, times, lambda number: strike(proxy))
        simulation.check(row, undisturbed)
        assert proxy.accepted >= (1 + times) * struck


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
    row: Row,
    times: int,
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
    fault = {"all of that": "latency, repetition and reordering"}.get(fault, fault)
    row.name = f"{fault} for {BAD_SECONDS:.0f} s, devices and server, {simulation.broker.kind}"
    with Proxy(simulation.broker.port, seed=1) as proxy:

        def worsen(number: int) -> None:
            proxy.latency, proxy.repeat, proxy.swap = latency, repeat, swap
            time.sleep(BAD_SECONDS)
            proxy.latency, proxy.repeat, proxy.swap = 0.0, 0.0, 0.0

        simulation.stage1 *= LONGER if full else 1
        simulation.start_server(url=proxy.url)
        simulation.start_fleet(url=proxy.url, delay=DELAY)
        strike_each(simulation.out, row, times, worsen)
        simulation.check(row, undisturbed)
        assert bool(proxy.repeated) == bool(repeat)
        assert bool(proxy.swapped) == bool(swap)


@pytest.mark.needs("mosquitto", "ip", "tc", "iptables")
@pytest.mark.parametrize(
    ("fault", "worsen"),
    [
        ("10% of packets lost", lambda network: network.lose(0.1)),
        ("1 Mbit/s and a short queue", lambda network: network.limit(1000)),
    ],
)
def test_lost_packets_and_low_bandwidth_lose_no_update(
    layout: TaskBundle,
    processes: Processes,
    tmp_path: Path,
    undisturbed: Undisturbed,
    row: Row,
    times: int,
    full: bool,
    fault: str,
    worsen: Callable[[NetworkSpace], None],
) -> None:
    """The broker has a network of its own, whose packets are dropped for real."""
    if not full:
        pytest.skip("in the long form only (--full)")
    row.name = f"{fault} for {BAD_SECONDS:.0f} s, devices and server, mosquitto"
    with NetworkSpace() as network:
        broker = RestartableBroker(processes, tmp_path, network=network)
        simulation = Simulation.for_faults(times * LONGER, processes, broker, layout, tmp_path)

        def strike(number: int) -> None:
            worsen(network)
            time.sleep(BAD_SECONDS)
            network.repair()

        simulation.start_server("--insecure")  # its address is none of this host
        simulation.start_fleet(delay=DELAY)
        strike_each(simulation.out, row, times, strike)
        simulation.check(row, undisturbed)


def test_devices_that_join_at_once_all_take_part(
    layout: TaskBundle, undisturbed: Undisturbed, tmp_path: Path, row: Row, times: int, full: bool, kind: str
) -> None:
    """A run for each try. It recovers when its first round is closed."""
    if not full or kind == "amqtt":
        pytest.skip("in the long form only (--full), on one kind of broker; more devices join in test_server_memory")
    row.name = f"{JOINING} devices joining at once, {kind}"
    for number in range(times):
        folder = tmp_path / str(number)
        with ExitStack() as stack:
            processes = stack.enter_context(Processes(tmp_path / "logs" / str(number)))
            broker = RestartableBroker(processes, folder, kind)
            simulation = Simulation(processes, broker, layout, folder, JOINING, stage1=1)
            simulation.start_server()
            with Recovery(simulation.out, row):
                simulation.start_fleet()
            simulation.check(row, undisturbed)
