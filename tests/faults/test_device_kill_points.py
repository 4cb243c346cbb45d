"""A real device is killed at each of its states. The results of the run are bit-identical."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from support.fault_records import Row
from support.kill_point import launcher
from support.processes import wait_until
from support.real_run import VICTIM, RealRun
from support.recovery import strike_each
from support.run_oracle import Reference

OUTBOX, GLOBALS = "edge_runtime.store.outbox:Outbox", "edge_runtime.store.global_store:GlobalStore"
RESIDUAL, EXPERT = "edge_runtime.training.updates:save_residual", "edge_runtime.training.local_expert:LocalExpert.save"
HALF_SENT = "when its update is half sent"
KILLS = {  # arguments of `kill_point.arm`; the last two are in stage 2
    "before its update is in the outbox": (f"{OUTBOX}.write", "before", 1),
    "when its update is in the outbox": (f"{OUTBOX}.write", "after", 1),
    HALF_SENT: ("edge_runtime.daemon.update_sender:Retransmissions.sent", "before", 1),
    "after the ack, before it is stored": (f"{OUTBOX}.acknowledge", "before", 1),
    "after the ack is stored, before the update is removed": (
        "edge_runtime.store.outbox:write_atomically",
        "after",
        1,
    ),
    "before globals are kept": (f"{GLOBALS}.write", "before", 1),
    "when globals are kept": (f"{GLOBALS}.write", "after", 1),
    "while training": ("edge_runtime.engines.step_graph:StepGraphEngine.step", "before", 3),
    "before the residual is saved": (RESIDUAL, "before", 1),
    "when the residual is saved": (RESIDUAL, "after", 1),
    "after the ack and the update's removal": (f"{OUTBOX}.acknowledge", "after", 1),
    "before the local expert is saved": (EXPERT, "before", 1),
    "when the local expert is saved": (EXPERT, "after", 1),
}
SHORT = {HALF_SENT, "when the residual is saved", "when the local expert is saved"}


def test_a_device_killed_at_each_of_its_states_gives_the_same_run(
    real_run: RealRun, undisturbed_real: Callable[[RealRun], Reference], row: Row, full: bool
) -> None:
    kind = real_run.federation.broker.kind
    if not full and kind == "amqtt":
        pytest.skip("on amqtt in the long form only (--full)")
    states = [state for state in KILLS if full or state in SHORT]
    row.name = f"real device SIGKILL at {len(states)} states, {kind}"
    folder = real_run.federation.folder
    armed = [folder / f"armed-{number}" for number in range(len(states))]
    launchers = [launcher(*KILLS[state], file) for state, file in zip(states, armed, strict=True)]

    def kill(number: int) -> None:
        armed[number].touch()
        ended = real_run.victim.wait()
        assert ended.code == -signal.SIGKILL, (states[number], ended.stdout[-1000:], ended.stderr[-1000:])

    def start_again(number: int) -> None:
        real_run.start(VICTIM, [*launchers, ("-m",)][number + 1])

    real_run.start_server()
    real_run.start_others()
    real_run.start(VICTIM, launchers[0])
    strike_each(real_run.out, row, len(states), start_again, before=kill)
    real_run.check(row, undisturbed_real(real_run))


def test_half_an_update_of_a_killed_device_has_reached_the_server(real_run: RealRun, full: bool) -> None:
    """The first update of a run: class sums, in several chunks."""
    if not full or real_run.federation.broker.kind == "amqtt":
        pytest.skip("in the long form only (--full); amqtt may not have passed it on")
    real_run.start_server()
    real_run.start_others()
    real_run.start(VICTIM, launcher(*KILLS[HALF_SENT]))
    assert real_run.victim.wait().code == -signal.SIGKILL
    wait_until(lambda: any((real_run.out / "uploads").iterdir()), "the server has a part of the update")
