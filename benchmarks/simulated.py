"""python -m benchmarks.simulated: a thousand devices in one process, speaking the real protocol, without a model.

Each has its own MQTT connection and the daemon's own state machine (`edge_runtime.daemon`); what is simulated is the
computation (`benchmarks.layouts.update_of`) and the disk: outbox and globals are remembered, not stored. One thread
serves all connections. Prints what the fleet has seen as JSON once every device has left.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import resource
import secrets
import selectors
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
import typer
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from benchmarks.layouts import update_of
from edge_runtime.daemon import (
    AckSeen,
    Command,
    Event,
    Fetch,
    GlobalArrived,
    Idle,
    Leave,
    Overdue,
    Reconnected,
    RoundSeen,
    SelfSeen,
    Send,
    ServerSeen,
    Settle,
    ShowSelf,
    State,
    Work,
    WorkDone,
    advance,
    patience,
)
from protocol.bundle import Bundle
from protocol.errors import BrokerError, ConfigError, RunError
from protocol.messages import Ack, DeviceStatus, Round, ServerStatus, Verdict, encode, parse
from protocol.tensors import MAX_BLOB_BYTES, Assembler, chunks, pack
from protocol.topics import Topics
from shell.cli import application
from shell.link import KEEPALIVE_SECONDS, QOS

LOOK_SECONDS = 1.0
RETRY_SECONDS = (0.5, 1.5)
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


class Device:
    """A device's state, its connection, and what it would keep on disk."""

    def __init__(self, name: str, fleet: Fleet) -> None:
        self.name = name
        self.busy = False
        self.left = False
        self.inbox: deque[Event] = deque()
        self._fleet = fleet
        self._topics = fleet.topics
        self._outbox: dict[int, bytes] = {}
        self._assemblers: dict[str, Assembler] = {}
        self._todo: deque[Command] = deque()
        self._retry = 0.0
        self._status = DeviceStatus(
            device=name,
            online=True,
            instance=secrets.token_hex(8),
            bundle=fleet.bundle.sha256,
            level_cap=fleet.level_cap,
        )
        self._state = State(name, self._status.instance, fleet.bundle.sha256)
        self._attempts = 0
        self._overdue = math.inf  # when an answer to what was sent last is waited for no longer
        self._subscriptions = {
            self._topics.ack(name),
            self._topics.server_status,
            self._topics.round,
            self._topics.status(name),
        }
        self.client = self._client()

    def _client(self) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            f"fedfmsl-{self._topics.run}-{self.name}-{self._status.instance}",
            protocol=paho.MQTTv311,
        )
        client.max_queued_messages_set(0)
        client.will_set(self._topics.status(self.name), self._farewell(), QOS, retain=True)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_socket_open = self._fleet.watch
        client.on_socket_close = self._fleet.unwatch
        client.on_socket_register_write = self._fleet.watch_writing
        client.on_socket_unregister_write = self._fleet.unwatch_writing
        return client

    def _farewell(self) -> bytes:
        return encode(self._status.model_copy(update={"online": False}))

    def look(self, now: float) -> None:
        """Once a second: keep alive or connect again, and let the daemon see that nothing happens."""
        if self.client.socket() is not None:
            self.client.loop_misc()
        elif not self.left and now >= self._retry:
            self._retry = now + random.uniform(*RETRY_SECONDS)
            try:
                self.client.connect(self._fleet.host, self._fleet.port, KEEPALIVE_SECONDS)
            except OSError:
                if not self._fleet.tally.connections:
                    raise
        if not self.busy and not self.left:
            if now >= self._overdue:
                self._overdue = math.inf
                self._advance(Overdue())
            self._advance(Idle())

    def turn(self) -> None:
        """Takes what has come in, as the daemon does: all of it, and only then does it start to work."""
        if self.busy or self.left:
            return
        while self.inbox and not self.busy:
            self._advance(self.inbox.popleft())
        if not self.busy:
            self._advance(Idle())

    def done(self, round_: int, blob: bytes) -> None:
        """The work it has been busy with lies in the outbox."""
        self.busy = False
        self._outbox[round_] = blob
        self._fleet.tally.updates += 1
        self._advance(WorkDone(round_))
        self.turn()

    def _advance(self, event: Event) -> None:
        self._state, commands = advance(self._state, event)
        self._todo.extend(commands)
        while self._todo and not self.busy and not self.left:
            self._carry_out(self._todo.popleft())

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, Fetch):
            self._subscribe(self._topics.globals_chunk(command.sha256, "+"))
        elif isinstance(command, Work):
            self.busy = True
            self._fleet.think(self, command.round)
        elif isinstance(command, Send):
            self._send(command.round)
        elif isinstance(command, Settle):
            self._outbox.pop(command.ack.round, None)
            self._attempts, self._overdue = 0, math.inf
            self._fleet.settled(command.ack)
        elif isinstance(command, ShowSelf):
            self.client.publish(self._topics.status(self.name), encode(self._status), QOS, retain=True)
        elif isinstance(command, Leave):
            if command.error:
                raise RunError(f"{self.name} left: {command.error}")
            self.left = True
            self.client.publish(self._topics.status(self.name), self._farewell(), QOS, retain=True)
            self.client.disconnect()

    def _send(self, round_: int) -> None:
        blob = self._outbox.get(round_)
        if blob is None:
            return
        self._fleet.tally.sends += 1
        self._overdue = time.monotonic() + patience(self.name, self._attempts)
        self._attempts += 1
        for index, chunk in enumerate(chunks(blob)):
            self._fleet.tally.bytes_up += len(chunk)
            self.client.publish(self._topics.update_chunk(self.name, round_, index), chunk, QOS)

    def _subscribe(self, topic: str) -> None:
        self._subscriptions.add(topic)
        self.client.subscribe(topic, QOS)

    def _on_connect(
        self, client: paho.Client, data: object, flags: paho.ConnectFlags, reason: ReasonCode, _: object
    ) -> None:
        if reason.is_failure:
            raise BrokerError(f"the broker refused {self.name}: {reason}")
        self._fleet.tally.connections += 1
        client.subscribe([(topic, QOS) for topic in sorted(self._subscriptions)])
        client.publish(self._topics.status(self.name), encode(self._status), QOS, retain=True)
        self._hear(Reconnected())

    def _on_message(self, client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        topic, payload = message.topic, bytes(message.payload)
        self._fleet.tally.bytes_down += len(payload)
        if not payload:
            return
        if topic == self._topics.server_status:
            self._hear(ServerSeen(parse(ServerStatus, payload)))
        elif topic == self._topics.round:
            announced = parse(Round, payload)
            self._fleet.heard(announced)
            self._hear(RoundSeen(announced))
        elif topic == self._topics.ack(self.name):
            self._hear(AckSeen(parse(Ack, payload)))
        elif topic == self._topics.status(self.name):
            self._hear(SelfSeen(parse(DeviceStatus, payload)))
        elif (sha256 := self._topics.globals_of(topic)) is not None:
            self._global_chunk(sha256, payload)

    def _global_chunk(self, sha256: str, chunk: bytes) -> None:
        """A finished blob has the SHA-256 that its chunks announce, and is not needed: the daemon only asks for it."""
        if self._assemblers.setdefault(sha256, Assembler(MAX_BLOB_BYTES)).add(chunk) is not None:
            del self._assemblers[sha256]
            topic = self._topics.globals_chunk(sha256, "+")
            self._subscriptions.discard(topic)
            self.client.unsubscribe(topic)
            self._hear(GlobalArrived(sha256))

    def _hear(self, event: Event) -> None:
        self.inbox.append(event)
        self._fleet.woken.add(self)


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

    def settled(self, ack: Ack) -> None:
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
) -> None:
    fleet = Fleet(Bundle(bundle), run, broker, device_names(devices, first), think, level_cap, seed)
    try:
        fleet.serve()
    except OSError as error:
        raise BrokerError(f"no MQTT broker at {broker} ({error}); start one or give another --broker") from error
    finally:
        print(json.dumps(asdict(fleet.tally)), flush=True)


if __name__ == "__main__":
    app()
