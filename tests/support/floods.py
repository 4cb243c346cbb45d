"""A member of a provisioned fleet that floods its broker and the server of a run."""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as paho

from devices.provisioning.broker_kit import QUEUED_BYTES
from fedfmsl.protocol.chunks import CHUNK_BYTES, chunks
from fedfmsl.protocol.messages import DeviceStatus, encode
from fedfmsl.protocol.task_bundle import TaskBundle
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.identity import read_identity
from fedfmsl.transport.link import Connected, Link, Received
from support.processes import Process, Processes, wait_until
from support.provisioned_fleet import HOSTS, Fleet, provision, start_fleet

RUN = "orchard"
TOPICS = Topics(RUN)
OBSERVER = "observer"
RETAINED = 100  # messages
BROKER_MB, SERVER_MB = 2 * QUEUED_BYTES / 1e6, 60  # bounds: of the broker, and of the server above its start
UNSENT = 50  # messages in the client's own queue


@dataclass
class Flooded:
    """A broker with the kit's configuration, and the server of a run that waits for devices."""

    fleet: Fleet
    broker: Process
    server: Process
    out: Path
    bundle: TaskBundle

    def announce(self, device: str) -> None:
        """Announces a device, which stays online."""
        status = DeviceStatus(device=device, online=True, bundle=self.bundle.sha256)
        link = Link(self.fleet.url, device, identity=self.fleet.device(device))
        link.connect()
        link.close(link.publish(TOPICS.status(device), encode(status), retain=True))

    def retained(self, device: str) -> int:
        """Number of retained messages of a device on the broker."""
        link, found = Link(self.fleet.url, OBSERVER, identity=self.fleet.device(OBSERVER)), 0
        link.connect()
        assert isinstance(link.next_event(10), Connected)
        link.subscribe(f"{TOPICS.root}/devices/{device}/#")
        while isinstance(event := link.next_event(0.5), Received):
            found += event.retained
        link.close()
        return found


def flooded(processes: Processes, bundle: Path, folder: Path, queued_bytes: int = QUEUED_BYTES) -> Flooded:
    """`queued_bytes`: the bound of the messages that wait for a client."""
    pki, out = folder / "pki", folder / "out"
    provision(pki, *HOSTS, "mallory", "device-0", OBSERVER)
    with (pki / "broker" / "acl").open("a") as rules:
        rules.write(f"user {OBSERVER}\ntopic read #\n")
    conf = pki / "broker" / "mosquitto.conf"
    conf.write_text(conf.read_text().replace(f"max_queued_bytes {QUEUED_BYTES}", f"max_queued_bytes {queued_bytes}"))
    fleet = start_fleet(pki, processes)
    server = processes.start_module(
        "server",
        "trainer_server",
        *("start", "--run", RUN, "--bundle", str(bundle), "--broker", fleet.url, "--identity", str(fleet.server)),
        *("--out", str(out), "--devices", "9"),
    )
    wait_until(lambda: "waiting" in server.stdout or not server.running, "the server")
    assert server.running, server.stderr
    return Flooded(fleet, processes.started["mosquitto"], server, out, TaskBundle.load(bundle))


def flood(scene: Flooded, seconds: float, name: str = "mallory") -> int:
    """Sends first chunks of updates that have no second one, with QoS 0 and as fast as the broker takes them. The first
    ones are retained. Returns their number."""
    scene.announce(name)
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, name)
    client.tls_set_context(read_identity(scene.fleet.device(name)).client_context())
    client.connect("localhost", scene.fleet.port)
    client.loop_start()
    end, sent = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        if len(client._out_packet) >= UNSENT:
            time.sleep(0.001)
            continue
        first = next(iter(chunks(secrets.token_bytes(CHUNK_BYTES + 1))))
        client.publish(TOPICS.update_chunk(name, 1, sent), first, qos=0, retain=sent < RETAINED)
        sent += 1
    client.disconnect()
    client.loop_stop()
    return sent


def memory(process: Process, peak: bool = False) -> float:
    """Resident memory in MB."""
    found = re.search(
        rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE
    )
    assert found
    return int(found[1]) / 1e3


def assert_survived(scene: Flooded, seconds: float) -> dict[str, float]:
    """Floods for `seconds`, and checks that memory is bounded, that the sender is named and its rubbish removed, and
    that an honest device can join. Returns the peaks of memory in MB."""
    before = memory(scene.server)
    flood(scene, seconds)
    peaks = {"broker": memory(scene.broker, peak=True), "server": memory(scene.server, peak=True)}
    assert peaks["broker"] < BROKER_MB and peaks["server"] < before + SERVER_MB, peaks
    wait_until(lambda: "mallory floods this server" in scene.server.stdout, "the server names it")
    wait_until(lambda: scene.retained("mallory") == 0, "its retained messages are removed")
    scene.announce("device-0")
    wait_until(lambda: "device-0" in json.loads((scene.out / "joined.json").read_bytes()), "an honest device joins")
    return peaks
