"""A device's health: published on the broker, reported to systemd, and written to the state directory."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edge_runtime.daemon.privacy_budget import epsilon_of
from edge_runtime.daemon.state import State
from edge_runtime.engines.memory import rss
from edge_runtime.resources.governor import Readings
from edge_runtime.resources.sensors import board
from edge_runtime.store import DeviceStore
from edge_runtime.training.context import DeviceContext
from fedfmsl.common.files import write_atomically
from fedfmsl.common.folder_walk import count_files
from fedfmsl.common.systemd import Watchdog, notify
from fedfmsl.errors import one_line
from fedfmsl.protocol.messages import HEALTH_SECONDS, MAX_AMOUNT, Activity, Health, Stage, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link


class HealthReporter:
    """Measures and publishes the health. `newest` is what was published last."""

    def __init__(
        self,
        link: Link,
        topics: Topics,
        name: str,
        store: DeviceStore,
        read: Callable[[], Readings],
        seconds: float = HEALTH_SECONDS,
    ) -> None:
        """`read` reads the sensors. Publishes every `seconds` while the activity stays the same."""
        self.newest: Health | None = None
        self.rounds_done = 0  # since the start
        self.provider = ""  # see `describe_choice`
        self.run_finished = False  # before the loop knows the round
        self.not_renewed = ""  # why the certificate is not; set in the thread of `Renewal`
        self._link = link
        self._topic = topics.health(name)
        self._store = store
        self._read = read
        self._started = _uptime()
        self._constant = {"device": name, "version": version("fedfmsl-edge"), "board": board()}
        self._seconds = seconds
        self._watchdog = Watchdog()
        self._due = 0.0

    def renewal_failed(self, reason: str) -> None:
        """`reason`: "" after a success."""
        self.not_renewed = reason

    def ready(self) -> None:
        notify("READY=1")

    def heartbeat(
        self,
        activity: Activity,
        device: DeviceContext | None = None,
        state: State | None = None,
        paused: str = "",
        slowdown: float = 1.0,
        alive: bool = True,
        refused: str = "",
    ) -> None:
        """To be called about once a second. Resets the watchdog if the daemon is `alive`, and publishes the health when
        the activity or the connection has changed, a round is done, or the next message is due. Without a connection it
        is only written to the state directory. `refused`: what the broker seems to refuse."""
        if alive:
            self._watchdog()
        newest, outage = self.newest, self._link.outage
        shown = (activity, self.rounds_done, one_line(outage.reason), one_line(refused))
        before = newest and (newest.activity, newest.rounds_done, newest.disconnected, newest.refused)
        if shown == before and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._seconds
        now = {"activity": activity, "paused": paused, "rounds_done": self.rounds_done, "slowdown": slowdown}
        now |= {"provider": self.provider, "refused": refused, "not_renewed": self.not_renewed}
        now |= {"stage": Stage.FINISHED.value} if self.run_finished else {}
        lost = {"disconnected": outage.reason, "disconnected_since": outage.since, "rejected": outage.rejected}
        now |= {**lost, **self._measured()}
        known = {**(_of_device(device) if device else {}), **(_of_state(state) if state else {})}
        self.newest = Health.model_validate({**self._constant, **now, **known})
        self._link.publish(self._topic, encode(self.newest), retain=True, qos=0)
        with contextlib.suppress(OSError):  # a full disk, which `DiskRetry` logs
            write_atomically(self._store.health, encode(self.newest))
        about = f": {paused}" if paused else f", round {self.newest.round}" if self.newest.round else ""
        stopping = "\nSTOPPING=1" if activity is Activity.STOPPED else ""
        notify(f"STATUS={activity.value}{about}{stopping}")

    def _measured(self) -> Mapping[str, Any]:
        now = time.time()
        return {
            "time": now,
            "started": max(now - (_uptime() - self._started), 0.0),  # right also after the clock was set
            "certificate_until": self._link.own_until,
            "broker_certificate_until": self._link.broker_until,
            "memory": rss(),
            "disk_free": _free(self._store.root),
            "epsilon": _epsilon(self._store),
            **vars(self._read()),
        }


def _uptime() -> float:
    """Seconds since the machine's start, also those that it slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _free(folder: Path) -> int:
    """Free bytes of the disk; 0 if the folder does not exist."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _epsilon(store: DeviceStore) -> float | None:
    """None also if the record cannot be read: the round that needs it says so."""
    try:
        epsilon = epsilon_of(store.budget.read())
    except OSError:
        return None
    return None if epsilon is None else min(epsilon, MAX_AMOUNT)


def _of_device(device: DeviceContext) -> Mapping[str, Any]:
    return {
        "level_cap": device.level_cap,
        "cache": device.cache.used,
        "skipped": count_files(device.scanned.skipped),
        **device.scanned.sizes,
        "new_samples": device.scanned.new,
        "proposed": dict(device.scanned.proposed),
    }


def _of_state(state: State) -> Mapping[str, Any]:
    known: dict[str, Any] = {"unacknowledged": len(state.unacknowledged)}
    if state.announced is not None:
        known |= {"round": state.announced.round, "stage": state.announced.stage.value, "level": state.announced.level}
    return known
