"""python -m benchmarks.simulated: many devices in one process that use the real protocol, without a model.

Each device has its own MQTT connection and the daemon's state machine (`benchmarks.simulated_device`). Computation
(`benchmarks.layouts.update_of`) and disk are simulated. One thread serves all connections. Prints the fleet's counts as
JSON when every device has stopped.
"""

from __future__ import annotations

import heapq
import json
import random
import resource
import selectors
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
import typer

from benchmarks.layouts import update_of
from benchmarks.simulated_device import Device
from benchmarks.simulated_tally import Tally
from edge_runtime.daemon.timing import ACK_TIMEOUT
from fedfmsl.common.backoff import Backoff
from fedfmsl.common.cli import application
from fedfmsl.errors import BrokerError, ConfigError
from fedfmsl.protocol.messages import Round
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import KEEPALIVE_SECONDS

TICK_SECONDS = 1.0
SPARE_FILES = 64  # open files besides the devices' connections

app = application()


class SimulatedFleet:
    """Devices on one broker, in one thread. `serve` returns when all have stopped."""

    def __init__(
        self,
        bundle: TaskBundle,
        run: str,
        broker: str,
        names: Sequence[str],
        delay: tuple[float, float] = (0.0, 0.0),
        level_cap: int | None = None,
        seed: int = 0,
        keepalive: int = KEEPALIVE_SECONDS,
        ack_timeout: Backoff = ACK_TIMEOUT,
    ) -> None:
        """`delay`: minimum and maximum seconds that a device takes for an update.

        Raises ConfigError if the process may not open that many connections.
        """
        allow_files(len(names) + SPARE_FILES)
        parts = urlsplit(broker)
        self.host, self.port = parts.hostname or "localhost", parts.port or 1883
        self.bundle, self.topics = bundle, Topics(run)
        self.level_cap = level_cap or bundle.manifest.levels
        self.tally = Tally()
        self.woken: set[Device] = set()
        self._selector = selectors.DefaultSelector()
        self.keepalive, self.ack_timeout = keepalive, ack_timeout
        self._delay, self._seed = delay, seed
        self._pending: list[tuple[float, int, Device, int, bytes]] = []  # heap of updates by the time they are finished
        self._devices = [Device(name, self) for name in names]

    def serve(self) -> None:
        """Raises BrokerError or OSError if the first connection fails, RunError if a device stops with an error."""
        next_tick = 0.0
        while not all(device.disconnected for device in self._devices):
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK_SECONDS
                for device in self._devices:
                    device.tick(now)
            while self._pending and self._pending[0][0] <= now:
                _, _, device, round_, blob = heapq.heappop(self._pending)
                device.finish(round_, blob)
            wake_at = min([next_tick, *(pending[0] for pending in self._pending[:1])])
            for key, mask in self._selector.select(0 if self.woken else max(0.0, wake_at - time.monotonic())):
                if mask & selectors.EVENT_READ:
                    key.data.loop_read()
                if mask & selectors.EVENT_WRITE:
                    key.data.loop_write()
            woken, self.woken = self.woken, set()
            for device in woken:
                device.process_inbox()

    def compute(self, device: Device, task: Round) -> None:
        """Calls the device's `finish` with its update after a random delay."""
        blob = pack(*update_of(self.bundle, device.name, task, self.level_cap))
        until = time.monotonic() + random.Random(f"{self._seed} {device.name} {task.round}").uniform(*self._delay)
        heapq.heappush(self._pending, (until, id(device), device, task.round, blob))

    def open_socket(self, client: paho.Client, data: object, sock: Any) -> None:
        self._selector.register(sock, selectors.EVENT_READ, client)

    def close_socket(self, client: paho.Client, data: object, sock: Any) -> None:
        self._selector.unregister(sock)

    def start_writing(self, client: paho.Client, data: object, sock: Any) -> None:
        self._selector.modify(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, client)

    def stop_writing(self, client: paho.Client, data: object, sock: Any) -> None:
        self._selector.modify(sock, selectors.EVENT_READ, client)


def allow_files(count: int) -> None:
    """Raises the limit of open files. Raises ConfigError if the system does not allow that many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ConfigError(f"{count} open files are needed and the system allows {hard}; raise it with ulimit -Hn")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def device_names(count: int, first: int = 0) -> list[str]:
    return [f"device-{index:04}" for index in range(first, first + count)]


@app.command()
def simulate(
    run: str = typer.Option(help="Name of the server's run."),
    bundle: Path = typer.Option(help="Folder of the bundle; one of benchmarks.layouts is enough."),
    devices: int = typer.Option(min=1, help="Number of devices."),
    first: int = typer.Option(0, min=0, help="Number of the first device, if there are several fleets."),
    broker: str = typer.Option("mqtt://localhost:1883", help="mqtt://host[:port]"),
    delay: tuple[float, float] = typer.Option((0.0, 0.0), help="Minimum and maximum seconds until an update is ready."),
    level_cap: int | None = typer.Option(None, min=1, help="Level cap of the devices. Default: the bundle's levels."),
    seed: int = typer.Option(0, help="Seed of the delays."),
    keepalive: int = typer.Option(KEEPALIVE_SECONDS, min=1, help="Seconds between two pings to the broker."),
    ack_timeout: float = typer.Option(ACK_TIMEOUT.first, help="Seconds until the first retransmit of an update."),
) -> None:
    """Simulate many devices of a run, in one process."""
    fleet = SimulatedFleet(
        TaskBundle.load(bundle),
        run,
        broker,
        device_names(devices, first),
        delay=delay,
        level_cap=level_cap,
        seed=seed,
        keepalive=keepalive,
        ack_timeout=replace(ACK_TIMEOUT, first=ack_timeout),
    )
    try:
        fleet.serve()
    except OSError as error:
        raise BrokerError(f"no MQTT broker at {broker} ({error}); start one or give another --broker") from error
    finally:
        print(json.dumps(asdict(fleet.tally)), flush=True)


if __name__ == "__main__":
    app()
