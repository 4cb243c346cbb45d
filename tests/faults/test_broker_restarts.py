"""The broker restarts in the middle of a round, with its messages and sessions or without."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.brokers import RestartableBroker
from support.fault_table import FaultTable
from support.processes import Observer, Processes
from support.run_oracle import Undisturbed
from support.simulation import RUN, Simulation, in_stage_1, recovering
from support.tools import require_tool

from fedfmsl.protocol.bundle import Bundle

DELAY = (0.2, 0.6)
AWAY_SECONDS = 2.0  # duration of the fault


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
    layout: Bundle,
    processes: Processes,
    tmp_path: Path,
    undisturbed: Undisturbed,
    table: FaultTable,
    full: bool,
    kind: str,
    persistent: bool,
    end: str,
) -> None:
    if not full:
        pytest.skip("with simulated devices in the long form only (--full); with real ones in tests/integration")
    if kind == "mosquitto":
        require_tool("mosquitto")
    broker = RestartableBroker(processes, tmp_path, kind, persistent, autosave=20)
    simulation = Simulation(processes, broker, layout, tmp_path)
    with Observer(broker, RUN) as observer:
        simulation.start_server()
        simulation.start_fleet(delay=DELAY)
        in_stage_1(observer)
        with recovering(simulation, observer) as seconds:
            (broker.kill if end == "kill" else broker.stop)()
            time.sleep(AWAY_SECONDS)
            broker.start()
        outcome = simulation.finish()
    memory = {"amqtt": "", "mosquitto": ", persistent" if persistent else ", forgetful"}[kind]
    name = f"broker restarted ({'SIGKILL' if end == 'kill' else 'SIGTERM'}{memory}), {kind}"
    table.add(name, outcome.trial(undisturbed(simulation.devices), *seconds))
