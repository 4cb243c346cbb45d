"""Brokers that drop, forbid or refuse messages, as real mosquittos with such settings."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.brokers import RestartableBroker
from support.processes import Processes

from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import BrokerError
from fedfmsl.transport.link import Connected, Link, SubscriptionRefused
from fedfmsl.transport.message_size import largest_message

needs_mosquitto = pytest.mark.needs("mosquitto")
ANYBODY = "allow_anonymous true"
SIZES = [100_000, 50_000, 2_000]
SECONDS = 2.5  # for a message to come back


@pytest.fixture
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    """A link to a broker with the lines of the test's parameter."""
    lines = [line.format(folder=tmp_path) for line in request.param]
    (tmp_path / "acl").write_text("topic readwrite other/#\n")
    with Processes(tmp_path / "logs") as processes:
        broker = RestartableBroker(processes, tmp_path / "broker", lines=lines)
        link = Link(broker.url, "device", reconnect=Backoff(first=1.0, longest=1.0))
        link.connect()
        yield link
        link.close()


@needs_mosquitto
@pytest.mark.parametrize(
    ("link", "largest"),
    [
        pytest.param((ANYBODY,), 100_000, id="no limit"),
        pytest.param((ANYBODY, "message_size_limit 65536"), 50_000, id="dropped"),
        pytest.param((ANYBODY, "max_packet_size 65536"), 50_000, id="connection ended"),
    ],
    indirect=["link"],
)
def test_the_largest_message_that_a_broker_takes_is_found(link: Link, largest: int) -> None:
    assert largest_message(link, "topic", SIZES, SECONDS) == largest
    assert link.subscriptions == set()


@needs_mosquitto
@pytest.mark.parametrize("link", [(ANYBODY, "retain_available false")], indirect=True, ids=["no retained messages"])
def test_a_broker_that_ends_connections_at_retained_messages_is_named_and_left_alone(link: Link) -> None:
    with pytest.raises(BrokerError, match="keeps no retained messages, which a run needs"):
        largest_message(link, "topic", SIZES[-1:], SECONDS)


@needs_mosquitto
@pytest.mark.parametrize("link", [(ANYBODY, "acl_file {folder}/acl")], indirect=True, ids=["access rules"])
def test_a_broker_that_returns_nothing_is_named_with_the_topic(link: Link) -> None:
    with pytest.raises(BrokerError, match="returns none of its messages on topic; check its access rules"):
        largest_message(link, "topic", SIZES[:1], seconds=0.5)


def refuse(listener: socket.socket, answers: int) -> None:
    """A broker that answers the first `answers` packets of a client, and every subscription with a refusal."""
    peer, _ = listener.accept()
    with peer:
        for _ in range(answers):
            packet = peer.recv(4096)
            peer.sendall(b"\x20\x02\0\0" if packet[0] == 0x10 else b"\x90\x03" + packet[2:4] + b"\x80")
        peer.recv(4096)


@contextmanager
def refusing(answers: int) -> Iterator[Link]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=refuse, args=(listener, answers), daemon=True).start()
        link = Link(f"mqtt://127.0.0.1:{listener.getsockname()[1]}", "device")
        yield link
        link.close()


def test_a_refused_subscription_is_an_event() -> None:
    with refusing(answers=2) as link:
        link.connect()
        assert link.next_event(10) == Connected()
        link.subscribe("a/topic")
        refused = link.next_event(10)
        assert isinstance(refused, SubscriptionRefused)
        assert refused.error.startswith("the broker refuses the subscription to a/topic; allow it")


def test_a_port_that_does_not_speak_mqtt_is_named_as_such() -> None:
    with refusing(answers=0) as link, pytest.raises(BrokerError, match="check that this is an MQTT port"):
        link.connect()
