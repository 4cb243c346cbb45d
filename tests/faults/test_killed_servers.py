"""SIGKILL for the server at each state of a round, and the same command again."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence

import pytest
from conftest import Undisturbed
from killing import launcher
from oracle import Reference
from processes import Observer
from simulation import RUN, Simulation
from table import FaultTable, Trial

from protocol.messages import Ack, Message, Round, Stage, Verdict

THINK = (0.1, 0.4)
STORE, SERVICE = "trainer_server.store:RunStore", "trainer_server.service:Service"
KILLS = 2  # in one run
Kill = tuple[str, str, int]  # see `killing.arm`
STATES = {
    "before a commit": (f"{STORE}.commit", "before", 8),
    "after a commit": (f"{STORE}.commit", "after", 8),
    "before the state is kept": (f"{STORE}.keep", "before", 2),
    "between the last commit and the announcement": (f"{STORE}.keep", "after", 2),
    "before an update's file is kept": ("trainer_server.uploads:Uploads.keep", "before", 12),
    "after an update's file is kept": ("trainer_server.uploads:Uploads.keep", "after", 12),
    "before an acknowledgement or another command": (f"{SERVICE}._carry_out", "before", 20),
    "after an acknowledgement or another command": (f"{SERVICE}._carry_out", "after", 20),
    "after the broker has what it published": ("shell.link:Link.publish", "after", 20),
    "while devices gather": (f"{SERVICE}._take", "before", 3),
}
ROUNDS = 7  # that are opened in a run, the last of them FINISHED
ENDS = {
    "before the end is committed": [("trainer_server.coordinator:_close", "after", ROUNDS - 1)],
    "after the end is committed, nobody told": [(f"{STORE}.keep", "after", ROUNDS)],
    "when the end has been announced": [(f"{SERVICE}._announce", "after", ROUNDS)],
}


def killed(simulation: Simulation, undisturbed: Reference, kills: Sequence[Kill], seed: int = 0) -> Trial:
    """A run whose server dies of one kill after the other, as many of them as it comes to. Recovery is from the last
    start until an update counts again, or all is over."""
    times, restarted = 0, 0.0
    with Observer(simulation.broker, RUN) as observer:
        simulation.start_fleet("--seed", str(seed), think=THINK)
        for kill in kills:
            ended = simulation.start_server(launcher=launcher(*kill)).wait()
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended.stderr
            times += 1
        else:
            since, restarted = observer.catch_up(), time.monotonic()
            simulation.start_server()
            observer.wait(Message, _goes_on, "an update that counts, or the end", since)
            restarted = time.monotonic() - restarted
        assert times
        return simulation.finish().trial(undisturbed, restarted or None, times)


def _goes_on(message: Message) -> bool:
    over = isinstance(message, Round) and message.stage is Stage.FINISHED
    return over or (isinstance(message, Ack) and message.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE))


@pytest.mark.parametrize("state", STATES)
def test_a_server_killed_at_a_state_of_a_round_goes_on_as_if_it_had_not_been(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, state: str, full: bool
) -> None:
    if not full or simulation.broker.kind == "amqtt":
        pytest.skip("state by state in the long form only (--full), on one kind of broker")
    point, when, most = STATES[state]
    draw = random.Random(state)
    calls = [draw.randint(1, most) for _ in range(KILLS)]
    trial = killed(simulation, undisturbed(simulation.devices), [(point, when, call) for call in calls])
    table.add(f"server SIGKILL {state}, {simulation.broker.kind}", trial)


@pytest.mark.parametrize("state", ENDS)
def test_a_server_killed_at_the_very_end_tells_the_devices_when_it_is_back(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, state: str, full: bool
) -> None:
    if simulation.broker.kind == "amqtt" or (not full and state != "after the end is committed, nobody told"):
        pytest.skip("one by one in the long form only (--full), on one kind of broker")
    trial = killed(simulation, undisturbed(simulation.devices), ENDS[state])
    table.add(f"server SIGKILL {state}, {simulation.broker.kind}", trial)


def test_a_server_killed_again_and_again_goes_on(
    simulation: Simulation, undisturbed: Undisturbed, table: FaultTable, full: bool
) -> None:
    if not full and simulation.broker.kind == "amqtt":
        pytest.skip("on amqtt in the long form only (--full)")
    kills = [(point, when, 1 + most // 4) for point, when, most in STATES.values()]
    trial = killed(simulation, undisturbed(simulation.devices), kills if full else kills[::2])
    assert trial.times >= (8 if full else 4)
    table.add(f"server SIGKILL again and again, {simulation.broker.kind}", trial)
