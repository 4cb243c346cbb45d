"""The server is killed at each state of a round and started again with the same command."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from support.brokers import RestartableBroker
from support.fault_records import Row
from support.kill_point import launcher
from support.processes import Processes
from support.recovery import Recovery, strike_each
from support.run_oracle import Undisturbed
from support.simulation import ROUNDS_PER_FAULT, STAGE2, Simulation

from fedfmsl.protocol.task_bundle import TaskBundle

DELAY = (0.1, 0.4)
STORE = "trainer_server.storage.run_store:RunStore"
STATES = {  # point and side of `kill_point.arm`, and the last call of which one is drawn
    "before a commit": (f"{STORE}.commit", "before", 5),
    "after a commit": (f"{STORE}.commit", "after", 5),
    "before the state is kept": (f"{STORE}.save_checkpoint", "before", 2),
    "between the last commit and the announcement": (f"{STORE}.save_checkpoint", "after", 2),
    "before an update is on the disk": ("trainer_server.storage.update_files:UpdateFiles.sync", "before", 6),
    "after an update is on the disk": ("trainer_server.storage.update_files:UpdateFiles.sync", "after", 6),
    "before an acknowledgement or another command": ("trainer_server.service.executor:Executor.execute", "before", 8),
    "after an acknowledgement or another command": ("trainer_server.service.executor:Executor.execute", "after", 8),
    "after the broker has what it published": ("fedfmsl.transport.link:Link.publish", "after", 12),
    "while devices gather": ("trainer_server.service.receiver:Receiver._receive", "before", 3),
}
SHORT = 2  # states in the short form
SHORT_STAGE1 = 1
ROUNDS = 3 + SHORT_STAGE1 + STAGE2  # that are opened in a run, the last of them FINISHED
ENDS = {
    "before the end is committed": ("trainer_server.coordinator.advance:close_round", "after", ROUNDS - 1),
    "after the end is committed, before it is announced": (f"{STORE}.save_checkpoint", "after", ROUNDS),
    "when the end has been announced": (
        "trainer_server.service.publisher:Publisher.announce_round",
        "after",
        ROUNDS,
    ),
}


@pytest.mark.parametrize("state", ENDS)
def test_a_server_killed_at_the_end_of_a_run_announces_the_end_after_its_restart(
    layout: TaskBundle,
    kind: str,
    tmp_path: Path,
    undisturbed: Undisturbed,
    row: Row,
    times: int,
    state: str,
    full: bool,
) -> None:
    """A run for each try. It recovers when the run is over for every device and the server."""
    if not full or kind == "amqtt":
        pytest.skip("in the long form only (--full), on one kind of broker")
    row.name = f"server SIGKILL {state}, {kind}"
    for number in range(times):
        folder = tmp_path / str(number)
        with Processes(tmp_path / "logs" / str(number)) as processes:
            broker = RestartableBroker(processes, folder, kind)
            simulation = Simulation(processes, broker, layout, folder, stage1=SHORT_STAGE1)
            simulation.start_fleet("--seed", str(number), delay=DELAY)
            ended = simulation.start_server(launcher=launcher(*ENDS[state])).wait()
            assert ended.code == -signal.SIGKILL, ended.stderr
            with Recovery(simulation.out, row):
                simulation.start_server()
                simulation.finish()
            simulation.check(row, undisturbed)


def test_a_server_killed_at_each_state_of_a_round_loses_nothing(
    simulation: Simulation, undisturbed: Undisturbed, row: Row, full: bool
) -> None:
    """In one run. The order of the states and the call at which the server is killed are random."""
    if not full and simulation.broker.kind == "amqtt":
        pytest.skip("on amqtt in the long form only (--full)")
    row.name = f"server SIGKILL at {len(STATES)} states of a round, {simulation.broker.kind}"
    draw = random.Random(0)
    kills = [STATES[state] for state in draw.sample(sorted(STATES), len(STATES) if full else SHORT)]
    simulation.stage1 = len(kills) * (1 + ROUNDS_PER_FAULT)
    armed = [simulation.folder / f"armed-{number}" for number in range(len(kills))]
    launchers = [
        launcher(point, when, draw.randint(1, most), file)
        for (point, when, most), file in zip(kills, armed, strict=True)
    ]

    def kill(number: int) -> None:
        armed[number].touch()
        ended = simulation.servers[-1].wait()
        assert ended.code == -signal.SIGKILL, ended.stderr

    def start_again(number: int) -> None:
        simulation.start_server(launcher=[*launchers, ("-m",)][number + 1])

    simulation.start_fleet(delay=DELAY)
    simulation.start_server(launcher=launchers[0])
    strike_each(simulation.out, row, len(kills), start_again, before=kill)
    simulation.check(row, undisturbed)
