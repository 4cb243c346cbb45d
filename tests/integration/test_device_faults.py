"""Faults of a device and its broker: a second device with the same identity, a full disk, a broker without its
messages, a lost acknowledgement."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bundles import Built
from support.held_round import FIRST, HOLDER, finished_rounds, hold_in_mid_round, start_all
from support.in_process_daemon import RUN, make_daemon
from support.machine_faults import PrivateDisk
from support.processes import (
    SECONDS,
    Broker,
    Ended,
    Federation,
    Observer,
    Processes,
    answers,
    broker_command,
    wait_until,
)
from support.samples import write_photos

from edge_runtime.daemon.timing import Timing
from fedfmsl.algorithms.sal import CapabilityQueue, Sal
from fedfmsl.common.backoff import Backoff
from fedfmsl.protocol.chunks import MAX_BLOB_BYTES, Assembler
from fedfmsl.protocol.messages import Ack, DeviceStatus, Round, ServerStatus, Stage, Training, Verdict, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received

KINDS = ["amqtt", pytest.param("mosquitto", marks=pytest.mark.needs("mosquitto"))]
DISK_BYTES = 4 << 20


def accepted(observer: Observer) -> Counter[tuple[str, int]]:
    """How often an update was accepted, by device and round."""
    acks = (message for message in observer.seen if isinstance(message, Ack))
    return Counter((ack.device, ack.round) for ack in acks if ack.verdict is Verdict.ACCEPTED)


@pytest.mark.parametrize(
    ("kind", "copied"),
    [
        pytest.param("amqtt", False, id="the same --device, amqtt"),
        pytest.param("mosquitto", True, id="a copied state folder, mosquitto", marks=pytest.mark.needs("mosquitto")),
    ],
)
def test_of_two_devices_with_one_identity_the_older_exits_and_the_run_continues(
    kind: str, copied: bool, bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    with Processes(tmp_path / "logs") as processes:
        broker = processes.start_broker(kind)
        with Observer(broker, "duplicate") as observer:
            federation = Federation("duplicate", broker, bundle, photos, tmp_path, processes)
            start_all(federation)
            hold_in_mid_round(federation, observer)
            state = tmp_path / "duplicate"
            if copied:
                # a running daemon replaces files: their temporary names may be gone before they are copied
                shutil.copytree(federation.state(FIRST), state, ignore=shutil.ignore_patterns(".*"))
            older = federation.devices.pop(FIRST)
            federation.devices[FIRST] = processes.start_module(
                "duplicate",
                "edge_runtime",
                *("run", "--run", "duplicate", "--images", str(photos[FIRST]), "--bundle", str(bundle)),
                *("--broker", broker.url, "--state", str(state), "--threads", "1"),
                *([] if copied else ["--device", FIRST]),
            )
            ended = older.wait()
            ended.assert_error(8, f"duplicate device name '{FIRST}'", "--device", "--state")
            federation.devices[HOLDER].resume()
            finished_rounds(federation, observer)
            instances = [m.instance for m in observer.seen if isinstance(m, DeviceStatus) and m.device == FIRST]
            assert len(set(instances)) == 2
            assert instances == sorted(
                instances, key=instances.index
            )  # the older one publishes no status after the newer one's first
            assert set(accepted(observer).values()) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_broker_that_restarts_in_a_round_without_its_messages_costs_no_update(
    kind: str, bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    with Processes(tmp_path / "logs") as processes:
        broker = processes.start_broker(kind)
        with Observer(broker, "forgotten") as observer:
            federation = Federation("forgotten", broker, bundle, photos, tmp_path, processes)
            start_all(federation)
            begun = hold_in_mid_round(federation, observer)
            for name in set(photos) - {HOLDER}:
                observer.wait(
                    Ack, lambda a, name=name: (a.device, a.round) == (name, begun.round), f"the answer to {name}"
                )
            since = len(observer.seen)
            start_again(processes, broker)
            observer.wait(DeviceStatus, lambda s: s.device == FIRST and s.online, "a device that is back", since)
            federation.devices[HOLDER].resume()
            finished_rounds(federation, observer)
            assert "connected to the broker again" in federation.devices[HOLDER].stdout


def start_again(processes: Processes, broker: Broker) -> None:
    """Kills the broker and starts it on the same port, without its retained messages and sessions."""
    port = broker.url.rpartition(":")[2]
    processes.started[f"broker-{broker.kind}"].kill()
    processes.start("broker-again", *broker_command(broker.kind, int(port)))
    wait_until(lambda: answers(int(port)), "the broker's return")


def test_a_device_with_a_full_disk_waits_and_finishes_the_run(
    broker: Broker, bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    disk = PrivateDisk(tmp_path / "devices" / FIRST, DISK_BYTES)
    with Processes(tmp_path / "logs") as processes, Observer(broker, "full") as observer:
        federation = Federation("full", broker, bundle, photos, tmp_path, processes)
        start_all(federation, FIRST)
        device = federation.devices[FIRST] = processes.start(
            FIRST,
            *(*disk.command, sys.executable, "-m", "edge_runtime", "run", "--run", "full", "--device", FIRST),
            *("--images", str(photos[FIRST]), "--bundle", str(bundle), "--threads", "1"),
            *("--broker", broker.url, "--state", str(federation.state(FIRST))),
        )
        begun = hold_in_mid_round(federation, observer)
        disk.seen_by(device.pid)
        disk.fill()
        federation.devices[HOLDER].resume()

        def reports_full_disk() -> bool:
            disk.fill()
            return "retrying until there is free space" in device.stdout

        wait_until(reports_full_disk, "the device to mention its full disk")
        disk.empty()
        rounds = finished_rounds(federation, observer)
        assert rounds[-1]["round"]["round"] > begun.round
        assert set(accepted(observer).values()) == {1}


def test_a_model_that_does_not_fit_on_the_disk_is_one_line_of_error(tmp_path: Path) -> None:
    disk = PrivateDisk(tmp_path / "disk", DISK_BYTES)
    program = "from fedfmsl.common.cli import application\napp = application('')\n@app.command()\ndef main() -> None:\n"
    program += "    from fedfmsl.common.files import write_atomically\n    from pathlib import Path\n"
    program += f"    write_atomically(Path({str(disk.folder / 'model')!r}), bytes({2 * DISK_BYTES}))\napp()"
    done = subprocess.run(
        [*disk.command, sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 74
    assert done.stderr.startswith("error: the disk is full (") and len(done.stderr.splitlines()) == 1


def test_a_read_only_state_folder_is_refused_at_once(tmp_path: Path) -> None:
    disk = PrivateDisk(tmp_path / "disk", DISK_BYTES, "ro")
    command = ("-m", "edge_runtime", "run", "--run", "r", "--images", str(tmp_path), "--state", str(disk.folder))
    done = subprocess.run(
        [*disk.command, sys.executable, *command], capture_output=True, text=True, check=False, timeout=SECONDS
    )
    Ended(done.returncode, done.stdout, done.stderr).assert_error(2, "cannot be written to", "Read-only", "--state")


def test_sigterm_ends_a_device_in_the_middle_of_a_round(
    broker: Broker, bundle: Path, photos: dict[str, Path], tmp_path: Path
) -> None:
    with Processes(tmp_path / "logs") as processes, Observer(broker, "sigterm") as observer:
        federation = Federation("sigterm", broker, bundle, photos, tmp_path, processes)
        start_all(federation)
        hold_in_mid_round(federation, observer)
        device = federation.devices[HOLDER]
        device.send_signal(signal.SIGTERM)
        device.resume()
        ended = device.wait()
        assert ended.code == 128 + signal.SIGTERM
        assert "Traceback" not in ended.stdout + ended.stderr
        observer.wait(DeviceStatus, lambda s: s.device == HOLDER and not s.online, "its last status")


SOON = Timing(ack=Backoff(first=0.2, longest=300.0, jitter=0.5))


@pytest.fixture
def photos_of_one(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", per_class=3)


def test_an_update_without_an_acknowledgement_is_sent_again_until_there_is_one(
    broker: Broker, vit: Built, photos_of_one: Path, tmp_path: Path
) -> None:
    daemon = make_daemon(vit, photos_of_one, tmp_path / "state", "unheard", broker.url, timing=SOON)
    device = daemon.device
    server, topics = Link(broker.url, "server"), Topics(RUN)
    server.connect()
    server.subscribe(topics.update_chunk(device.device_name, "+", "+"))
    bundle, task_sha256 = vit.bundle.sha256, vit.bundle.task.sha256
    status = ServerStatus(online=True, run=RUN, session="s", bundle=bundle, task=task_sha256)
    server.publish(topics.server_status, encode(status), retain=True)
    task = Round(
        run=RUN,
        session="s",
        round=1,
        stage=Stage.STATISTICS,
        index=0,
        of=1,
        level=1,
        training=Training(epochs=1, learning_rate=1.0),
        sal=Sal(CapabilityQueue(2, 0.1), max_level=1),
    )
    server.publish(topics.round, encode(task), retain=True)
    serving = threading.Thread(target=daemon.connect_and_serve)
    serving.start()
    try:
        updates = whole_updates(server, topics)
        assert len({next(updates) for _ in range(3)}) == 1  # identical bytes each time
        ack = Ack(run=RUN, session="s", round=1, device=device.device_name, verdict=Verdict.DUPLICATE)
        server.publish(topics.ack(device.device_name), encode(ack))
        wait_until(lambda: device.store.outbox.acknowledged == 1, "the device to store the acknowledgement")
    finally:
        finished = task.model_copy(update={"round": 2, "stage": Stage.FINISHED})
        server.publish(topics.round, encode(finished), retain=True)
        serving.join(SECONDS)
        server.close()
    assert not serving.is_alive()
    assert device.store.outbox.unacknowledged("s") == frozenset()


def whole_updates(server: Link, topics: Topics) -> Iterator[bytes]:
    assembler = Assembler(MAX_BLOB_BYTES)
    while True:
        event = server.next_event(SECONDS)
        assert event is not None
        if isinstance(event, Received) and topics.update_of(event.topic):
            blob = assembler.add(event.payload)
            if blob is not None:
                yield blob
