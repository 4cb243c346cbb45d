"""A standing run in the test's process: its server, whose wall clock the test moves, and real devices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.daemon import launch
from edge_runtime.daemon.loop import DaemonLoop
from edge_runtime.daemon.round_runner import RoundRunner
from edge_runtime.daemon.state import Stop
from edge_runtime.daemon.timing import Timing
from edge_runtime.settings import Settings
from fedfmsl.common.settings import read_settings
from fedfmsl.protocol.task_bundle import TaskBundle
from support.processes import RUN_SECONDS, SECONDS, Broker, wait_until
from trainer_server.config import RunConfig
from trainer_server.service.lifecycle import open_run, run_server

QUICK = Timing(tick=0.05, scan=0.2, scan_share=0.5, health=0.2)


class Killed(BaseException):
    """A server ends as at a crash."""


@dataclass
class WallClock:
    """The wall clock of the server. `broken`: the server ends when it looks at it."""

    at: datetime
    broken: bool = False

    def __call__(self) -> float:
        if self.broken:
            raise Killed
        return self.at.timestamp()

    def move_to(self, hour: int) -> None:
        """The next moment at which it shows this hour."""
        ahead = (hour - self.at.hour) % 24 or 24
        self.at += timedelta(hours=ahead)


class Thread:
    """A call in a thread of its own. `error`: what has ended it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error

    def end(self) -> BaseException | None:
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        return self.error


@dataclass
class NightFleet:
    bundle: TaskBundle
    broker: Broker
    folder: Path
    config: RunConfig
    clock: WallClock
    server: Thread = field(init=False)
    devices: dict[str, Thread] = field(default_factory=dict)
    loops: dict[str, DaemonLoop] = field(default_factory=dict)
    runners: dict[str, RoundRunner] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "server"

    @property
    def notes(self) -> str:
        path = self.out / "notes.log"
        return path.read_text() if path.is_file() else ""

    def photos(self, name: str) -> Path:
        return self.folder / "photos" / name

    def state(self, name: str) -> Path:
        return self.folder / "devices" / name

    def says(self, text: str, times: int = 1) -> None:
        """Waits until the server's log says it so often."""

        def has_said() -> bool:
            failed = [error for thread in (self.server, *self.devices.values()) if (error := thread.error)]
            assert not failed, failed
            return self.notes.count(text) >= times

        wait_until(has_said, f"the log says {text!r}, {times} times", RUN_SECONDS)

    def start_server(self) -> None:
        self.server = Thread(self._serve)

    def stop_server(self) -> None:
        self.clock.broken = True
        assert isinstance(self.server.end(), Killed)

    def _serve(self) -> None:
        store = open_run(self.out, self.config, self.bundle)
        bundle = TaskBundle(self.bundle, store.task())
        run_server(store, bundle, self.broker.url, "", None, insecure=False, wall=self.clock)

    def start_device(self, name: str) -> None:
        """Its state is in the folder of the first start."""
        values = {
            "run": self.config.run,
            "broker": self.broker.url,
            "images": str(self.photos(name)),
            "state": str(self.state(name)),
            "bundle": str(self.bundle.root),
            "threads": "1",
            "provider": "cpu",
            **({} if name in self.devices else {"device": name}),
        }
        settings = read_settings(Settings, flags=values, environment=False)
        self.devices[name] = Thread(partial(launch.launch, settings))

    def task_of(self, name: str) -> str:
        """SHA-256 of the task that the device takes part with; "" while it prepares."""
        return self.runners[name].device.bundle.task.sha256 if name in self.loops else ""

    def stop_device(self, name: str) -> None:
        self.loops.pop(name)._stop = Stop()
        assert self.devices[name].end() is None

    def patch(self, patch: pytest.MonkeyPatch, with_models: bool) -> None:
        """Devices look for new photos at once, and do not change the logging of this process. `with_models`: they write
        personalized.onnx, in a process each."""

        def loop(
            topics: Any, link: Any, announcer: Any, health: Any, governor: Any, runner: Any, *more: Any, **named: Any
        ):
            made = DaemonLoop(topics, link, announcer, health, governor, runner, *more, **named, timing=QUICK)
            self.loops[runner.device.device_name], self.runners[runner.device.device_name] = made, runner
            return made

        patch.setattr(launch, "DaemonLoop", loop)
        patch.setattr(launch, "set_up_logging", lambda *arguments: None)
        if not with_models:
            patch.setattr(RoundRunner, "write_personalized", lambda runner: None)
