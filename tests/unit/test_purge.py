"""Removal of everything that an old run has left on a real mosquitto."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.brokers import RestartableBroker
from support.processes import Broker, Processes

from devices.provisioning.broker_kit import password_line
from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import BrokerError, RunError
from fedfmsl.protocol.messages import DeviceStatus, ServerStatus, encode, parse
from fedfmsl.protocol.topics import Topics, discovery_topic
from fedfmsl.transport.link import Link, Received, Will
from trainer_server.service.purge import purge

pytestmark = pytest.mark.needs("mosquitto")
MANY = 1100  # more messages than mosquitto delivers at once


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Processes(tmp_path_factory.mktemp("logs")) as processes:
        yield processes.start_broker("mosquitto")


def retained(broker: Broker, topic_filter: str) -> set[str]:
    """The topics with a retained message."""
    link = Link(broker.url, f"reader-{time.monotonic_ns()}")
    link.connect()
    link.subscribe(topic_filter)
    found = set()
    while (event := link.next_event(0.5)) is not None:
        if isinstance(event, Received) and event.payload:
            found.add(event.topic)
    link.close()
    return found


def publish(broker: Broker, messages: dict[str, bytes]) -> None:
    link = Link(broker.url, "publisher")
    link.connect()
    sent = [link.publish(topic, payload, retain=True) for topic, payload in messages.items()]
    link.close(sent[-1])


@pytest.mark.parametrize(("prefix", "chunks"), [("fedfmsl", 1), ("tenant-7/fedfmsl", MANY)])
def test_all_that_a_run_has_left_is_removed_and_nothing_else(broker: Broker, prefix: str, chunks: int) -> None:
    topics, other = Topics("orchard", prefix), Topics("orchard2", prefix)
    names = ["d0", "d1"]
    status = ServerStatus(online=False, run="orchard", session="1")
    left = {topics.status(name): encode(DeviceStatus(device=name, online=True)) for name in names}
    left |= {topics.globals_chunk("a" * 64, index): b"chunk" for index in range(chunks)}
    left |= {topics.server_status: encode(status)}
    left |= {discovery_topic("homeassistant", "orchard", name): b"{}" for name in names}
    inner = Topics("r", topics.root)  # of another tenant
    left |= {f"{topics.root}/devices/d0/update/what/a/device/leaves": b"x"}
    stays = {inner.round: b"{}", inner.status("d0"): b"{}"}
    stays |= {other.server_status: encode(status), discovery_topic("homeassistant", "orchard2", "d0"): b"{}"}
    publish(broker, {**left, **stays})
    assert purge(Link(broker.url, "purge"), topics, "homeassistant", server_seconds=0.1) == len(left)
    assert retained(broker, "#") == set(stays)
    publish(broker, dict.fromkeys(stays, b""))


def answer(link: Link, topic: str, online: bytes) -> None:
    """As a server does when the broker says that it is offline."""
    while (event := link.next_event(30.0)) is not None:
        if isinstance(event, Received) and event.topic == topic and not parse(ServerStatus, event.payload).online:
            link.publish(topic, online, retain=True)
            return


def test_a_run_whose_server_is_online_is_not_touched(broker: Broker) -> None:
    topics = Topics("alive")
    online = encode(ServerStatus(online=True, run="alive", session="1"))
    kept = {topics.globals_chunk("a" * 64, index): b"chunk" for index in range(MANY)}
    kept[topics.server_status] = online
    publish(broker, kept)
    server = Link(broker.url, "server")
    server.connect()
    server.subscribe(topics.server_status)
    thread = threading.Thread(target=answer, args=(server, topics.server_status, online))
    thread.start()
    with pytest.raises(RunError, match="the server of run 'alive' is online; stop it"):
        purge(Link(broker.url, "purge"), topics, "", server_seconds=0.0)
    thread.join()
    server.close()
    for index in (0, MANY - 1):
        assert retained(broker, topics.globals_chunk("a" * 64, index))
    publish(broker, dict.fromkeys(kept, b""))


def test_a_server_that_lost_power_with_the_broker_is_not_online(broker: Broker) -> None:
    topics = Topics("dark")
    publish(broker, {topics.server_status: encode(ServerStatus(online=True, run="dark", session="1"))})
    assert purge(Link(broker.url, "purge"), topics, "", busy_seconds=0.1) == 1
    assert not retained(broker, topics.server_status)


def test_a_server_whose_connection_the_client_ends_is_not_touched(tmp_path: Path) -> None:
    """Both have one identity, and the broker allows one connection per identity."""
    topics, (user, password) = Topics("alive"), ("server", "secret")
    online, offline = (encode(ServerStatus(online=each, run="alive", session="1")) for each in (True, False))
    (tmp_path / "passwords").write_text(password_line(user, password))
    lines = ["allow_anonymous false", f"password_file {tmp_path / 'passwords'}", "use_username_as_clientid true"]
    with Processes(tmp_path / "logs") as processes:
        url = RestartableBroker(processes, tmp_path / "broker", lines=lines).url
        url = url.replace("//", f"//{user}:{password}@")
        server = Link(url, "", Will(topics.server_status, offline), reconnect=Backoff(first=1.0, longest=1.0))
        server.connect()
        server.publish(topics.round, b"{}", retain=True)
        server.publish(topics.server_status, online, retain=True).wait_for_publish(10)
        with pytest.raises(BrokerError, match="stop the run's server if it runs"):
            purge(Link(url, ""), topics, "")
        server.subscribe(topics.round)
        while not isinstance(event := server.next_event(10), Received):
            assert event is not None
        server.close()


def test_a_client_that_may_not_read_the_run_is_told(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(broker.url, "forbidden")
    monkeypatch.setattr(link, "subscribe", lambda topic: None)  # as a broker that delivers nothing
    with pytest.raises(BrokerError, match="does not deliver fedfmsl/orchard/#"):
        purge(link, Topics("orchard"), "", echo_seconds=0.2)
