"""python -m benchmarks.simulated: a thousand devices in one process, speaking the real protocol, without a model.

Each has its own MQTT connection and the daemon's own state machine (`benchmarks.simulated_device`); what is simulated
is the computation (`benchmarks.layouts.update_of`) and the disk. One thread serves all connections. Prints what the
fleet has seen as JSON once every device has left.
"""

from __future__ import annotations

import heapq
import json
import random
import resource
import selectors
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
import typer

from benchmarks.layouts import update_of
from benchmarks.simulated_device import Device
from edge_runtime.daemon.timing import ACK_TIMEOUT
from fedfmsl.common.backoff import Backoff
from fedfmsl.common.cli import application
from fedfmsl.errors import BrokerError, ConfigError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Ack, Round, Verdict
from fedfmsl.protocol.tensors import pack
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import KEEPALIVE_SECONDS

LOOK_SECONDS = 1.0
SPARE_FILES = 64  # open ones that are not a device's connection

app = application("Many simulated devices on one broker.")


@dataclass
class RoundSeconds:
    """When a round was first heard of, and when its last acknowledgement came, in seconds since the fleet's start."""

    stage: str
    announced: float
    last_ack: float = 0.0


@dataclass
class Tally:
    """What a fleet has seen. `updates` counts each once, `sends` every time it went out; bytes are payloads'.
    `counted`: by round, the devices that were told that their update counts (accepted, now or before)."""

    updates: int = 0
    sends: int = 0
    connections: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    acks: dict[str, int] = field(default_factory=dict)
    counted: dict[int, list[str]] = field(default_factory=dict)
    rounds: dict[int, RoundSeconds] = field(default_factory=dict)


class Fleet:
    """Devices on one broker, served by one thread; `serve` until all have left the run."""

    def __init__(
        self,
        bundle: Bundle,
        run: str,
        broker: str,
        names: Sequence[str],
        think: tuple[float, float] = (0.0, 0.0),
        level_cap: int | None = None,
        seed: int = 0,
        keepalive: int = KEEPALIVE_SECONDS,
        ack_timeout: Backoff = ACK_TIMEOUT,
    ) -> None:
        """`think`: the least and the most seconds that a device takes to answer a round. Raises ConfigError if so many
        connections are not allowed to one process."""
        allow_files(len(names) + SPARE_FILES)
        parts = urlsplit(broker)
        self.host, self.port = parts.hostname or "localhost", parts.port or 1883
        self.bundle, self.topics = bundle, Topics(run)
        self.level_cap = level_cap or bundle.manifest.levels
        self.tally = Tally()
        self._selector = selectors.DefaultSelector()
        self.woken: set[Device] = set()
        self._think, self._seed = think, seed
        self.keepalive, self.ack_timeout = keepalive, ack_timeout
        self._thoughts: list[tuple[float, int, Device, int, bytes]] = []  # a heap by the time they are finished
        self._started = time.monotonic()
        self._devices = [Device(name, self) for name in names]

    def serve(self) -> None:
        """Raises BrokerError or OSError if the broker cannot be reached at first, RunError if a device cannot take
        part."""
        look = 0.0
        while not all(device.left and device.client.socket() is None for device in self._devices):
            now = time.monotonic()
            if now >= look:
                look = now + LOOK_SECONDS
                for device in self._devices:
                    device.look(now)
            while self._thoughts and self._thoughts[0][0] <= now:
                _, _, device, round_, blob = heapq.heappop(self._thoughts)
                device.done(round_, blob)
            soon = min([look, *(thought[0] for thought in self._thoughts[:1])])
            for key, mask in self._selector.select(0 if self.woken else max(0.0, soon - time.monotonic())):
                if mask & selectors.EVENT_READ:
                    key.data.loop_read()
                if mask & selectors.EVENT_WRITE:
                    key.data.loop_write()
            woken, self.woken = self.woken, set()
            for device in woken:
                device.turn()

    def think(self, device: Device, task: Round) -> None:
        """The device's answer, once it has thought for a while."""
        blob = pack(*update_of(self.bundle, device.name, task, self.level_cap))
        until = time.monotonic() + random.Random(f"{self._seed} {device.name} {task.round}").uniform(*self._think)
        heapq.heappush(self._thoughts, (until, id(device), device, task.round, blob))

    def heard(self, announced: Round) -> None:
        self.tally.rounds.setdefault(announced.round, RoundSeconds(announced.stage.value, self._clock()))

    def acknowledged(self, ack: Ack) -> None:
        self.tally.acks[ack.verdict.value] = self.tally.acks.get(ack.verdict.value, 0) + 1
        if ack.verdict in (Verdict.ACCEPTED, Verdict.DUPLICATE):
            self.tally.counted.setdefault(ack.round, []).append(ack.device)
        if ack.round in self.tally.rounds:
            self.tally.rounds[ack.round].last_ack = self._clock()

    def watch(self, client: paho.Client, data: object, sock: Any) -> None:
        """This and the next three: paho says which sockets there are, and which of them want to write."""
        self._selector.register(sock, selectors.EVENT_READ, client)

    def unwatch(self, client: paho.Client, data: object, sock: Any) -> None:
        self._selector.unregister(sock)

    def watch_writing(self, client: paho.Client, data: object, sock: Any) -> None:
        self._selector.modify(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, client)

    def unwatch_writing(self, client: paho.Client, data: object, sock: Any) -> None:
        self._selector.modify(sock, selectors.EVENT_READ, client)

    def _clock(self) -> float:
        return round(time.monotonic() - self._started, 4)


def allow_files(wanted: int) -> None:
    """Raises ConfigError if a process may not open so many files at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigError(f"{wanted} open files are needed and the system allows {hard}; raise it with ulimit -Hn")
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def device_names(count: int, first: int = 0) -> list[str]:
    return [f"device-{index:04}" for index in range(first, first + count)]


@app.command()
def simulate(
    run: str = typer.Option(help="The run's name, as the server has it."),
    bundle: Path = typer.Option(help="The bundle's folder; one of benchmarks.layouts is enough."),
    devices: int = typer.Option(min=1),
    first: int = typer.Option(0, min=0, help="Number of the first device, where several fleets make one."),
    broker: str = typer.Option("mqtt://localhost:1883", help="mqtt://host[:port]"),
    think: tuple[float, float] = typer.Option((0.0, 0.0), help="Least and most seconds to answer a round."),
    level_cap: int | None = typer.Option(None, min=1, help="Default: the bundle's levels."),
    seed: int = typer.Option(0, help="Of the seconds to answer."),
    keepalive: int = typer.Option(KEEPALIVE_SECONDS, min=1, help="Seconds between two pings to the broker."),
    ack_timeout: float = typer.Option(ACK_TIMEOUT.first, help="Seconds until an update is sent again, at first."),
) -> None:
    timeout = replace(ACK_TIMEOUT, first=ack_timeout)
    fleet = Fleet(
        Bundle.load(bundle), run, broker, device_names(devices, first), think, level_cap, seed, keepalive, timeout
    )
    try:
        fleet.serve()
    except OSError as error:
        raise BrokerError(f"no MQTT broker at {broker} ({error}); start one or give another --broker") from error
    finally:
        print(json.dumps(asdict(fleet.tally)), flush=True)


if __name__ == "__main__":
    app()
