"""The description of a device's last health message."""

from __future__ import annotations

import ssl
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from support.bundles import Built
from support.training_contexts import announced_round

from edge_runtime.daemon.download import wait_for_server
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.lock import locked
from edge_runtime.daemon.prepare import Daemon, RunOverError, goes_on
from edge_runtime.daemon.status import check_alive, describe
from edge_runtime.resources.governor import Readings
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.errors import BrokerError, RunError
from fedfmsl.protocol.messages import MAX_HEARTBEAT_AGE, Activity, Health, ServerStatus, Stage, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received
from fedfmsl.transport.tls_errors import explain, is_rejection

BUNDLE, HASH = "a" * 64, "e" * 64


@pytest.mark.parametrize(
    ("activity", "age", "expected"),
    [
        (Activity.WAITING, 40, "last heartbeat 0:00:40 ago, up for 0:01:40"),
        (Activity.STOPPED, 40, "last heartbeat 0:00:40 ago, ran for 0:01:00"),
        (Activity.WAITING, 10 * MAX_HEARTBEAT_AGE, ", ran for 0:01:00"),
    ],
)
def test_uptime_and_last_heartbeat_agree(tmp_path: Path, activity: Activity, age: float, expected: str) -> None:
    health = Health(device="kitchen", started=1000, time=1060, activity=activity)
    assert expected in dict(describe(health, DeviceStore(tmp_path), now=1060 + age))["now"]


def test_a_lost_connection_is_described_with_its_reason(tmp_path: Path) -> None:
    health = Health(device="kitchen", started=1000, time=1060, activity=Activity.WAITING)
    assert "broker" not in dict(describe(health, DeviceStore(tmp_path), now=1061))
    lost = health.model_copy(update={"disconnected": "Not authorized", "disconnected_since": 1050})
    broker = dict(describe(lost, DeviceStore(tmp_path), now=1061))["broker"]
    assert broker.startswith("no connection since 19") and broker.endswith("because: Not authorized")
    denied = health.model_copy(update={"refused": "the broker does not return this device's own status"})
    assert dict(describe(denied, DeviceStore(tmp_path), now=1061))["broker"] == denied.refused


def test_a_killed_daemon_is_noticed_before_its_heartbeat_is_old(tmp_path: Path) -> None:
    health = Health(device="kitchen", started=1000, time=time.time(), activity=Activity.WAITING)
    check_alive(health, tmp_path)  # no lock that this user can read: only the heartbeat counts
    with locked(tmp_path, "stop it"):
        check_alive(health, tmp_path)
    with pytest.raises(RunError, match=r"the daemon ended after its heartbeat .* ago; check its log"):
        check_alive(health, tmp_path)


def test_after_a_finished_run_it_says_what_the_device_waits_for_and_predicts_with(tmp_path: Path) -> None:
    health = Health(device="kitchen", started=1, time=time.time(), activity=Activity.WAITING, round=9, stage="finished")
    shown = dict(describe(health, DeviceStore(tmp_path), time.time()))
    assert shown["round"] == "the run has finished; this device waits for a new run of this name"
    assert shown["model"] == "none yet"
    check_alive(health, tmp_path)
    with pytest.raises(RunError, match="the run has finished, and the daemon stopped 0:00:00 ago; start it again"):
        check_alive(health.model_copy(update={"activity": Activity.STOPPED}), tmp_path)


def test_it_shows_new_samples_proposed_classes_and_a_renewal_that_failed(tmp_path: Path) -> None:
    known = {"train": 12, "new_samples": 3, "proposed": {"fig": 5}, "not_renewed": "it was revoked"}
    health = Health(device="kitchen", started=1, time=time.time(), activity=Activity.WAITING, **known)
    shown = dict(describe(health, DeviceStore(tmp_path), time.time()))
    assert shown["samples"].startswith("12 train (3 new), ") and "fig (5)" in shown["proposes"]
    assert shown["renewal"] == "failed: it was revoked; the daemon tries again"


def test_a_device_whose_certificate_is_refused_fails(tmp_path: Path) -> None:
    health = Health(device="kitchen", started=1, time=time.time(), activity=Activity.WAITING, disconnected="timed out")
    check_alive(health, tmp_path)
    assert not is_rejection(ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"))
    alert = ssl.SSLError(1, "[SSL: SSLV3_ALERT_CERTIFICATE_REVOKED] ssl/tls alert certificate revoked")
    with pytest.raises(BrokerError, match="the broker refuses this device: our certificate is revoked"):
        lost = {"disconnected": explain(alert), "rejected": is_rejection(alert)}
        check_alive(health.model_copy(update=lost), tmp_path)


def test_a_device_that_waits_for_the_bundle_of_the_next_run_knows_the_end_of_the_last(vit: Built) -> None:
    topics, ends = Topics("r"), list[str]()
    link = Link("mqtt://127.0.0.1:9", "d")  # not connected
    server = ServerStatus(online=True, run="r", session="s2", bundle=vit.bundle.sha256)
    gone = server.model_copy(update={"online": False, "session": "s"})
    finished, last = (topics.round, announced_round(Stage.FINISHED, session="s")), (topics.server_status, gone)
    for topic, message in (finished, last, finished, (topics.server_status, server)):
        link.events.put(Received(topic, encode(message)))
    assert wait_for_server(link, topics, finished=lambda _, end: bool(ends.append(end.session))) == server
    assert ends == ["s"]


@pytest.mark.parametrize(
    ("session", "own", "expert", "stay", "expected"),
    [
        ("s", BUNDLE, HASH, False, None),
        ("s", BUNDLE, HASH, True, False),
        ("other", BUNDLE, HASH, False, True),
        ("other", "b" * 64, HASH, False, False),
        ("other", "", HASH, False, False),  # the server, which has the bundle, has gone
        ("other", BUNDLE, "", False, False),
    ],
)
def test_a_device_uses_a_finished_run_without_it_and_waits_for_the_next_one_only_if_it_stays(
    tmp_path: Path, session: str, own: str, expert: str, stay: bool, expected: bool | None
) -> None:
    """None: it ends. As with a bundle of its own, where the loop decides."""
    settings = Settings(run="r", images=tmp_path, broker="mqtt://127.0.0.1:9", stay=stay)
    store = DeviceStore(tmp_path)
    store.outbox.enter(session, "r")
    link, topics = Link(settings.broker, "d"), Topics("r")
    health = HealthReporter(link, topics, "d", store, Readings)
    daemon = Daemon(settings, link, topics, store, "d", health)
    server = ServerStatus(online=False, run="r", session="s", bundle=BUNDLE)
    end = announced_round(Stage.FINISHED, session="s", expert=expert, gate=HASH)
    with pytest.raises(RunOverError) if expected is None else nullcontext():
        assert goes_on(daemon, own, server, end) is expected
    assert health.run_finished
