"""python -m benchmarks.crowd: tens of thousands of devices on one MQTT connection, without a model.

For numbers of devices whose connections one machine cannot hold beside broker and server. Each device has its own
topics, retained status, heartbeat and update, and computes itself whether a round asks it; connection and process are
shared. Its values are one of PROTOTYPES random updates. At most `--window` updates are on their way at a time, so that
the messages wait in the devices, as with devices that need different times. An update without an acknowledgement is
sent again. Prints the counts as JSON when the run has finished.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

import paho.mqtt.client as paho
import typer
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.layouts import update_of
from benchmarks.simulated import device_names
from benchmarks.simulated_tally import Tally
from edge_runtime.daemon.timing import ACK_TIMEOUT
from fedfmsl.algorithms.arrays import Tensors
from fedfmsl.common.cli import application
from fedfmsl.errors import BrokerError, MessageError
from fedfmsl.protocol.chunks import chunks
from fedfmsl.protocol.messages import (
    HEALTH_SECONDS,
    Ack,
    Activity,
    DeviceStatus,
    Health,
    Round,
    ServerStatus,
    Stage,
    Update,
    Verdict,
    encode,
    parse,
)
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.tensors import pack
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import KEEPALIVE_SECONDS, QOS

PROTOTYPES = 16
WAIT_SECONDS = 0.05

app = application()


class Crowd:
    """All devices, in one thread. `serve` returns when the run has finished."""

    def __init__(self, bundle: TaskBundle, run: str, broker: str, names: list[str], window: int) -> None:
        self.tally = Tally()
        self._bundle, self._topics, self._names, self._window = bundle, Topics(run), names, window
        self._chunk_bytes = 0  # as the server's status says
        self._started, self._heartbeats = time.monotonic(), 0
        self._greets = False
        self._announced: Round | None = None
        self._prototypes: list[tuple[Update, Tensors]] = []
        self._waiting: deque[str] = deque()  # devices that are asked and have not sent
        self._sent: dict[str, float] = {}  # device → when its update is sent again
        parts = urlsplit(broker)
        self._client = client = paho.Client(CallbackAPIVersion.VERSION2, f"crowd-{run}", protocol=paho.MQTTv311)
        client.max_queued_messages_set(0)
        client.max_inflight_messages_set(max(window, 20))
        client.on_message = self._on_message
        client.connect(parts.hostname or "localhost", parts.port or 1883, KEEPALIVE_SECONDS)
        self.tally.connections = 1

    def serve(self) -> None:
        """Raises BrokerError if the connection is lost."""
        for topic in (self._topics.server_status, self._topics.round, self._topics.ack("+")):
            self._client.subscribe(topic, QOS)
        while self._announced is None or self._announced.stage is not Stage.FINISHED:
            if self._client.loop(WAIT_SECONDS) is not paho.MQTT_ERR_SUCCESS:
                raise BrokerError("the broker closed the connection")
            if self._greets:  # as devices do when a server comes online
                self._greets = False
                self._publish_statuses(online=True)
            now = time.monotonic()
            overdue = [device for device, due in self._sent.items() if now >= due] if self._sent else []
            for device in overdue:
                self._send(device, now)
            self._send_heartbeats(now)
            while self._waiting and len(self._sent) < self._window:
                self._send(self._waiting.popleft(), now)
        self._publish_statuses(online=False)
        self._client.disconnect()

    def _publish_statuses(self, online: bool) -> None:
        sha256, cap = self._bundle.sha256, self._bundle.manifest.levels
        for name in self._names:
            status = DeviceStatus(device=name, online=online, instance="crowd", bundle=sha256, level_cap=cap)
            self._client.publish(self._topics.status(name), encode(status), QOS, retain=True)
            while self._client.want_write():
                self._client.loop_write()

    def _send_heartbeats(self, now: float) -> None:
        """Heartbeats of the devices, one after the other, so that each has one in HEALTH_SECONDS."""
        due = int((now - self._started) * len(self._names) / HEALTH_SECONDS)
        for number in range(self._heartbeats, due):
            name = self._names[number % len(self._names)]
            health = Health(device=name, time=time.time(), started=0, activity=Activity.WAITING)
            self._client.publish(self._topics.health(name), encode(health), QOS, retain=True)
        self._heartbeats = due

    def _on_message(self, client: paho.Client, data: object, message: paho.MQTTMessage) -> None:
        topic, payload = message.topic, bytes(message.payload)
        self.tally.bytes_down += len(payload)
        try:
            if topic == self._topics.server_status:
                status = parse(ServerStatus, payload)
                self._chunk_bytes, self._greets = status.chunk_bytes, status.online
            elif topic == self._topics.round:
                self._begin(parse(Round, payload))
            else:
                self._acknowledged(parse(Ack, payload))
        except MessageError:
            return

    def _begin(self, announced: Round) -> None:
        self.tally.add_round(announced)
        if self._announced is not None and announced.round == self._announced.round:
            return
        self._announced = announced
        cap = self._bundle.manifest.levels
        self._prototypes = [update_of(self._bundle, f"prototype-{n}", announced, cap) for n in range(PROTOTYPES)]
        self._sent.clear()
        self._waiting = deque(name for name in self._names if announced.asks(name))
        if announced.stage is Stage.FINISHED:
            self._waiting.clear()

    def _send(self, device: str, now: float) -> None:
        assert self._announced is not None
        update, tensors = self._prototypes[sum(device.encode()) % PROTOTYPES]
        blob = pack(update.model_copy(update={"device": device}), tensors)
        self.tally.updates += device not in self._sent
        self.tally.sends += 1
        self._sent[device] = now + ACK_TIMEOUT.first
        for index, chunk in enumerate(chunks(blob, self._chunk_bytes)):
            self.tally.bytes_up += len(chunk)
            topic = self._topics.update_chunk(device, self._announced.round, index)
            self._client.publish(topic, chunk, QOS)

    def _acknowledged(self, ack: Ack) -> None:
        if ack.verdict is Verdict.INCOMPLETE:
            return
        self.tally.add_ack(ack)
        if self._announced is not None and ack.round == self._announced.round:
            self._sent.pop(ack.device, None)


@app.command()
def crowd(
    run: str = typer.Option(help="Name of the server's run."),
    bundle: Path = typer.Option(help="Folder of the bundle; one of benchmarks.layouts is enough."),
    devices: int = typer.Option(min=1, help="Number of devices."),
    broker: str = typer.Option("mqtt://localhost:1883", help="mqtt://host[:port]"),
    window: int = typer.Option(64, min=1, help="Updates that are on their way at a time."),
) -> None:
    """Simulate tens of thousands of devices of a run on one connection."""
    try:
        fleet = Crowd(TaskBundle.load(bundle), run, broker, device_names(devices), window)
    except OSError as error:
        raise BrokerError(f"no MQTT broker at {broker} ({error}); start one or give another --broker") from error
    fleet.serve()
    tally = asdict(fleet.tally)
    tally["counted"] = {round_: len(set(devices_)) for round_, devices_ in fleet.tally.counted.items()}
    print(json.dumps(tally), flush=True)


if __name__ == "__main__":
    app()
