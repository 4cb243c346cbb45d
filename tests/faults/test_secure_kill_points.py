"""A real device, or the server, is killed at each step of secure sums. The results of the run are bit-identical."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from support.fault_records import Row
from support.kill_point import launcher
from support.real_run import VICTIM, RealRun, Shape
from support.recovery import strike_each
from support.run_oracle import Reference

DEVICE, OUTBOX = "edge_runtime.daemon.secure_rounds:SecureRounds", "edge_runtime.store.outbox:Outbox"
STORE = "trainer_server.storage.run_store:RunStore"
KILLS = {  # arguments of `kill_point.arm` at the steps of a secure sum
    VICTIM: [
        *(
            (f"{DEVICE}.{step}", when, 1)
            for step in ("_keys", "_shares", "mask", "_unmask")
            for when in ("before", "after")
        ),
        (f"{OUTBOX}.write", "after", 2),
        (f"{OUTBOX}.acknowledge", "before", 3),
    ],
    "server": [
        *((f"{STORE}.commit", when, call) for when in ("before", "after") for call in (1, 2, 4)),
        *((f"{STORE}.save_checkpoint", when, call) for when in ("before", "after") for call in (1, 2)),
    ],
}
SHAPE = Shape(stage1=12, stage2=2, secure=True)


@pytest.mark.parametrize("side", KILLS)
def test_a_device_or_server_killed_at_each_step_of_secure_sums_gives_the_same_run(
    real_run: RealRun, undisturbed_real: Callable[[RealRun], Reference], row: Row, full: bool, side: str
) -> None:
    if not full or real_run.federation.broker.kind == "amqtt":
        pytest.skip(
            "in the long form only (--full), on one kind of broker; see tests/integration/test_killed_secure_device.py"
        )
    kills, run = KILLS[side], real_run
    row.name = (
        f"{'real device' if side == VICTIM else 'server'} SIGKILL at {len(kills)} steps of secure sums, mosquitto"
    )
    run.shape = SHAPE
    armed = [run.federation.folder / f"armed-{number}" for number in range(len(kills))]
    launchers = [*(launcher(*kill, file) for kill, file in zip(kills, armed, strict=True)), ("-m",)]

    def start(number: int) -> None:
        if side == VICTIM:
            run.start(VICTIM, launchers[number])
        else:
            run.start_server(launchers[number])

    def kill(number: int) -> None:
        armed[number].touch()
        ended = (run.victim if side == VICTIM else run.server).wait()
        assert ended.code == -signal.SIGKILL, (kills[number], ended.stdout[-1000:], ended.stderr[-1000:])

    if side == VICTIM:
        run.start_server()
    else:
        run.start(VICTIM)
    start(0)
    run.start_others()
    strike_each(run.out, row, len(kills), lambda number: start(number + 1), before=kill)
    run.check(row, undisturbed_real(run))
