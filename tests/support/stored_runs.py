"""Folders of runs as their servers would have written them, without a server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedfmsl.protocol.messages import Activity, DeviceStatus, Health, Round, Stage, Training, Update
from support.bundles import Built
from support.coordinators import RULE, plan_for
from trainer_server.coordinator.records import ClosedRound
from trainer_server.storage.observations import Observations, ServerView
from trainer_server.storage.origin import Origin
from trainer_server.storage.run_store import RunStore

ANSWERING = 20  # devices in the records of rounds, so that a long run is soon written


def stored_run(folder: Path, built: Built, devices: int, rounds: int, ended: str | None = None, **texts: Any) -> Path:
    """A run with that many devices, and closed rounds of stage 1. `texts`: fields of every device's heartbeat."""
    plan = plan_for(built, devices, run=folder.name)
    origin = Origin(
        config=plan.config,
        session="s",
        bundle=built.bundle.root,
        sha256=built.bundle.sha256,
        task=built.bundle.task.sha256,
    )
    store = RunStore.create(folder, origin, built.bundle.task)
    names = [f"device-{number:04}" for number in range(devices)]
    answering = names[: ANSWERING + 1]
    store.commit([], [closed_round(folder.name, number, rounds, answering) for number in range(1, rounds + 1)])
    if ended is not None:
        store.commit([], ended=ended)
    store.close()
    observe(folder, names, built.bundle.sha256, **texts)
    return folder


def closed_round(run: str, number: int, of: int, names: Sequence[str]) -> ClosedRound:
    announced = Round(
        run=run,
        session="s",
        round=number,
        stage=Stage.GLOBAL,
        index=number - 1,
        of=of,
        level=1,
        training=Training(epochs=1, learning_rate=1e-3),
        sal=RULE,
    )
    updates = {
        name: Update(
            run=run,
            session="s",
            round=number,
            device=name,
            stage=Stage.GLOBAL,
            level=1,
            samples=100,
            metrics={"held_out_global": number / (of + 1)},
            bytes_down=30_000,
        )
        for name in names[1:]
    }
    sizes = dict.fromkeys(updates, 20_000)
    return ClosedRound(round=announced, seconds=5.0, updates=updates, bytes_up=sizes, missing=tuple(names[:1]))


def observe(folder: Path, names: Sequence[str], bundle: str, **texts: Any) -> None:
    """What the server has just seen of these devices."""
    observations, now = Observations(folder), time.time()
    for name in names:
        fields = {"activity": Activity.WAITING, "board": "Raspberry Pi 5", "temperature": 55.0, **texts}
        observations.heartbeat(Health(device=name, time=now, started=now, **fields), now)
    statuses = {name: DeviceStatus(device=name, online=True, bundle=bundle, train=80, level_cap=3) for name in names}
    observations.save(ServerView(seen=now, deadline=now + 300, round_timeout=600.0), statuses)
    observations.close()
