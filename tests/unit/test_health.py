"""A device's health: on a real broker, to a service manager, and on its disk."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from support.bundles import Built
from support.in_process_daemon import RUN, make_daemon
from support.processes import SECONDS, Broker, Processes
from support.training_contexts import announced_round

from devices.provisioning.authority import CLIENT, SERVER, make_authority
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.launch import connect
from edge_runtime.daemon.state import State
from edge_runtime.resources.governor import Readings
from edge_runtime.store import DeviceStore
from edge_runtime.store.budget_store import Spent
from fedfmsl.algorithms.accounting import gaussian_epsilon
from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import BrokerError
from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import Activity, Health, Stage, parse
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received

WARM = Readings(temperature=61.5, on_battery=False, others=0.25)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Processes(tmp_path_factory.mktemp("logs")) as processes:
        yield processes.start_broker()


@pytest.fixture
def observer(broker: Broker) -> Iterator[Link]:
    link = Link(broker.url, "observer")
    link.connect()
    link.subscribe(Topics(RUN).health("+"))
    yield link
    link.close()


def next_health(observer: Link) -> Health:
    while True:
        event = observer.next_event(SECONDS)
        assert event is not None
        if isinstance(event, Received) and event.payload:
            return parse(Health, event.payload)


def test_health_is_published_when_the_activity_changes_after_a_round_and_at_intervals(
    vit: Built, photos: Path, tmp_path: Path, broker: Broker, observer: Link
) -> None:
    daemon = make_daemon(vit, photos, tmp_path / "state", "kitchen", broker.url)
    device, link = daemon.device, daemon.link
    device.cache.pooled(device.scanned.train, level=1)
    link.connect()
    health_reporter = HealthReporter(link, Topics(RUN), "kitchen", device.store, lambda: WARM)
    health_reporter.heartbeat(Activity.STARTING)
    starting = next_health(observer)
    while starting.activity is not Activity.STARTING:
        starting = next_health(observer)
    assert (starting.device, starting.activity, starting.temperature) == ("kitchen", Activity.STARTING, 61.5)
    assert 10e6 < starting.memory < 10e9 and starting.disk_free > 0
    assert starting.train == 0

    announced = announced_round(Stage.GLOBAL, level=2)
    state = State("kitchen", DuplicateNameGuard(""), "", announced=announced, unacknowledged=frozenset({1, 2}))
    assert starting.epsilon is None  # no update with noise yet
    device.store.budget.write(Spent(mu_squared=1.0, updates=1))
    health_reporter.rounds_done = 2
    health_reporter.heartbeat(Activity.WORKING, device, state)
    health_reporter.heartbeat(
        Activity.WORKING, device, replace(state, unacknowledged=frozenset())
    )  # not published: the activity is the same
    health_reporter.rounds_done = 3
    health_reporter.heartbeat(Activity.WORKING, device, state)
    health_reporter.heartbeat(Activity.PAUSED, device, state, "81.5 °C, above --max-temperature 75")
    working, done, paused = next_health(observer), next_health(observer), next_health(observer)
    assert working.activity is Activity.WORKING
    assert (done.activity, done.rounds_done) == (Activity.WORKING, 3)  # also if the next round has begun at once
    assert (working.round, working.stage, working.level, working.level_cap) == (3, "global", 2, device.level_cap)
    assert (working.unacknowledged, working.rounds_done) == (2, 2)
    assert (working.train, working.held_out) == (len(device.scanned.train), len(device.scanned.held_out))
    assert working.cache == device.cache.used > 0
    assert paused.epsilon == pytest.approx(gaussian_epsilon(1.0, 1e-5))
    assert (paused.activity, paused.paused) == (Activity.PAUSED, "81.5 °C, above --max-temperature 75")
    assert paused == health_reporter.newest == Health.model_validate_json(device.store.health.read_bytes())

    eager = HealthReporter(link, Topics(RUN), "kitchen", device.store, lambda: WARM, seconds=0.0)
    eager.heartbeat(Activity.WAITING, device, state)
    eager.heartbeat(Activity.WAITING, device, state)
    assert next_health(observer).time < next_health(observer).time
    late = Link(broker.url, "late-observer")
    late.connect()
    late.subscribe(Topics(RUN).health("kitchen"))
    assert next_health(late) == eager.newest  # retained
    late.close()
    link.close()


def test_the_uptime_is_right_after_the_clock_was_set(
    vit: Built, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = make_daemon(vit, photos, tmp_path / "state")
    health_reporter = HealthReporter(daemon.link, Topics(RUN), "d", daemon.device.store, Readings, seconds=0.0)
    late = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: late)
    health_reporter.heartbeat(Activity.WAITING)
    assert health_reporter.newest is not None
    assert health_reporter.newest.time == late
    assert 0 <= late - health_reporter.newest.started < 60


def test_without_a_connection_no_messages_are_queued(
    vit: Built, photos: Path, tmp_path: Path, broker: Broker, observer: Link
) -> None:
    daemon = make_daemon(vit, photos, tmp_path / "state", "offline", broker.url)
    device, link = daemon.device, daemon.link
    health_reporter = HealthReporter(link, Topics(RUN), "offline", device.store, Readings, seconds=0.0)
    for _ in range(100):
        health_reporter.heartbeat(Activity.WAITING, device)
    assert Health.model_validate_json(device.store.health.read_bytes()).activity is Activity.WAITING
    link.connect()
    health_reporter.heartbeat(Activity.STOPPED, device)
    received = next_health(observer)
    while received.device != "offline":  # the broker retains those of other tests
        received = next_health(observer)
    assert received.activity is Activity.STOPPED
    link.close()


def test_systemd_receives_the_activity(
    vit: Built, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        daemon = make_daemon(vit, photos, tmp_path / "state")
        device, link = daemon.device, daemon.link
        health_reporter = HealthReporter(link, Topics(RUN), "d", device.store, Readings)
        health_reporter.heartbeat(Activity.STARTING)
        health_reporter.ready()
        health_reporter.heartbeat(Activity.PAUSED, device, paused="outside of --hours 22:00-06:00")
        health_reporter.heartbeat(Activity.STOPPED, device)
        words = [manager.recv(4096).decode() for _ in range(4)]
    assert words == [
        "STATUS=starting",
        "READY=1",
        "STATUS=paused: outside of --hours 22:00-06:00",
        "STATUS=stopped\nSTOPPING=1",
    ]


def test_a_device_whose_clock_is_behind_waits_for_the_right_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a board without a battery for its clock after it was switched on."""
    authority, later = make_authority("fleet"), datetime.now(timezone.utc) + timedelta(days=9)
    own = tmp_path / "own.pem"
    device = authority.issue("kitchen", [CLIENT], now=later)
    own.write_text(device.key_pem + device.certificate_pem + authority.certificate_pem)
    own.chmod(0o600)
    contexts = []
    for issued in (authority.issue("broker", [SERVER], ["localhost"], now=now) for now in (later, later, None)):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pem = tmp_path / "broker.pem"
        pem.write_text(issued.key_pem + issued.certificate_pem)
        context.load_cert_chain(pem)
        contexts.append(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            for context in contexts:  # the last one is valid, as after the clock was set
                with listener.accept()[0] as accepted, suppress(OSError):
                    context.wrap_socket(accepted, server_side=True).close()

        thread = threading.Thread(target=accept)
        thread.start()
        link = Link(f"mqtts://localhost:{listener.getsockname()[1]}", "kitchen", identity=own)
        store = DeviceStore(tmp_path / "state")
        health = HealthReporter(link, Topics(RUN), "kitchen", store, Readings)
        with pytest.raises(BrokerError, match="refused the connection"):  # it is no broker
            connect(link, health, Backoff(first=0.01, longest=0.01))
        thread.join()
    since = f"{later - timedelta(days=1):%Y-%m-%d}"
    assert f"its certificate is not valid yet; this machine's own is valid from {since}; set the clock" in caplog.text
    assert "set the clock" in Health.model_validate_json(store.health.read_bytes()).disconnected
