"""The server is killed at each state of a round and started again with the same command."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence

import pytest
from support.fault_table import FaultTable, Trial
from support.kill_point import launcher
from support.processes import Observer
from support.run_oracle import Reference, Undisturbed
from support.simulation import RUN, Simulation

from fedfmsl.protocol.messages import Ack, Message, Round, ServerStatus, Stage, Verdict

DELAY = (0.1, 0.4)
STORE, SERVICE = "trainer_server.storage.run_store:RunStore", "trainer_server.service.loop:Service"
RUNS = 2  # in the long form
Kill = tuple[str, str, int]  # see `killing.arm`
STATES = {
    "before a commit": (f"{STORE}.commit", "before", 5),
    "after a commit": (f"{STORE}.commit", "after", 5),
    "before the state is kept": (f"{STORE}.save_checkpoint", "before", 2),
    "between the last commit and the announcement": (f"{STORE}.save_checkpoint", "after", 2),
    "before an update's file is kept": ("trainer_server.storage.uploads:Uploads.store", "before", 6),
    "after an update's file is kept": ("trainer_server.storage.uploads:Uploads.store", "after", 6),
    "before an acknowledgement or another command": (f"{SERVICE}._execute", "before", 8),
    "after an acknowledgement or another command": (f"{SERVICE}._execute", "after", 8),
    "after the broker has what it published": ("fedfmsl.transport.link:Link.publish", "after", 12),
    "while devices gather": (f"{SERVICE}._receive", "before", 3),
}
ROUNDS = 7  # that are opened in a run, the last of them FINISHED
ENDS = {
    "before the end is committed": [("trainer_server.coordinator.advance:_close_round", "after", ROUNDS - 1)],
    "after the end is committed, before it is announced": [(f"{STORE}.save_checkpoint", "after", ROUNDS)],
    "when the end has been announced": [("trainer_server.service.publisher:Publisher.announce_round", "after", ROUNDS)],
}


def killed(simulation: Simulation, undisturbed: Reference, kills: Sequence[Kill], seed: int = 0) -> Trial:
    """A run whose server is killed at one point after the other until the run is finished. Recovery is the time from
    the last start until an update is accepted or the run is finished."""
    times, restarted = 0, 0.0
    with Observer(simulation.broker, RUN) as observer:
        simulation.start_fleet("--seed", str(seed), delay=DELAY)
        for kill in kills:
            ended = simulation.start_server(launcher=launcher(*kill)).wait()
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended.stderr
            times += 1
        else:
            since, restarted = observer.catch_up(), time.monotonic()
            simulation.start_server()
            observer.wait(ServerStatus, lambda status: status.online, "the restarted server", since)
            observer.wait(Message, _goes_on, "an accepted update, or the end", len(observer.seen))
            restarted = time.monotonic() - restarted
        assert times
        return simulation.finish().trial(undisturbed, restarted or None, times)


def _goes_on(message: Message) -> bool:
    over = isinstance(message, Round) and message.stage is Stage.FINISHED
    return over or (isinstance(message, Ack) and message.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE))


@pytest.mark.parametrize("state", ENDS)
def test_a_server_killed_at_the_end_of_a_run_announces_the_end_after_its_restart(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, state: str, full: bool
) -> None:
    if not full or simulation.broker.kind == "amqtt":
        pytest.skip("in the long form only (--full), on one kind of broker")
    trial = killed(simulation, undisturbed(simulation.devices), ENDS[state])
    table.add(f"server SIGKILL {state}, {simulation.broker.kind}", trial)


@pytest.mark.parametrize("seed", range(RUNS))
def test_a_server_killed_at_each_state_of_a_round_loses_nothing(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, full: bool, seed: int
) -> None:
    """In one run. The call at which the server is killed is random."""
    if not full and (seed or simulation.broker.kind == "amqtt"):
        pytest.skip("more than one, and on amqtt, in the long form only (--full)")
    draw = random.Random(seed)
    states = draw.sample(sorted(STATES), len(STATES) if full else len(STATES) // 2)
    kills = [(point, when, draw.randint(1, most)) for point, when, most in (STATES[state] for state in states)]
    trial = killed(simulation, undisturbed(simulation.devices), kills, seed)
    assert trial.times >= len(kills) // 2  # the last of them may come too late, after the end
    table.add(f"server SIGKILL at {len(STATES)} states of a round, {simulation.broker.kind}", trial)
