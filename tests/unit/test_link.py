"""The link with a real mosquitto without authentication, and with a WebSocket server of this test."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from support.brokers import RestartableBroker
from support.processes import Processes, wait_until
from support.tools import require_tool

from devices.provisioning.broker_kit import password_line
from fedfmsl.common.backoff import Backoff
from fedfmsl.common.settings import read_settings
from fedfmsl.errors import BrokerError, ConfigError
from fedfmsl.transport import bounded_client
from fedfmsl.transport.address import parse_address
from fedfmsl.transport.bounded_client import MAX_PAYLOAD
from fedfmsl.transport.link import KEEPALIVE_SECONDS, MAX_EVENTS, Connected, Link, LinkEvent, Oversize, Received
from fedfmsl.transport.listening import parse_listen
from fedfmsl.transport.settings import ConnectionSettings

needs_mosquitto = pytest.mark.needs("mosquitto")
HUGE = 100_000_000
SPARE = 8 << 20  # bytes of memory that a huge message may take


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a mosquitto that forwards messages of any size. By default mosquitto 2.1 refuses more than 2 MB."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
    settings = tmp_path_factory.mktemp("mosquitto") / "mosquitto.conf"
    lines = [f"listener {free} 127.0.0.1", "allow_anonymous true", f"max_packet_size {2 * HUGE}"]
    settings.write_text("\n".join(lines) + "\n")
    broker = subprocess.Popen([require_tool("mosquitto"), "-c", str(settings)], stderr=subprocess.DEVNULL)
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", free)) == 0:
                break
        time.sleep(0.02)
    yield free
    broker.terminate()
    broker.wait()


def connected(port: int, name: str, topic: str = "", keepalive: int = KEEPALIVE_SECONDS) -> Link:
    link = Link(f"mqtt://127.0.0.1:{port}", name, keepalive=keepalive)
    link.connect()
    assert link.next_event(10) == Connected()
    if topic:  # the subscription is active once a message on it comes back
        link.subscribe(f"{topic}/#")
        link.publish(f"{topic}/ready", b"")
        assert link.next_event(10) == Received(f"{topic}/ready", b"")
    return link


def peak_rss() -> int:
    """Peak resident memory of this process in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def next_events(link: Link, count: int) -> list[LinkEvent | None]:
    return [link.next_event(30) for _ in range(count)]


def send(port: int, topic: str, size: int, scratch: Path) -> None:
    """Publishes from another process, which needs memory for the message."""
    scratch.write_bytes(b"")
    os.truncate(scratch, size)
    script = (
        "import sys, paho.mqtt.client as paho\n"
        "c = paho.Client(paho.CallbackAPIVersion.VERSION2)\n"
        "c.connect('127.0.0.1', int(sys.argv[1])); c.loop_start()\n"
        "c.publish(sys.argv[2], open(sys.argv[3], 'rb').read(), 1).wait_for_publish(60); c.disconnect()\n"
    )
    subprocess.run([sys.executable, "-c", script, str(port), topic, str(scratch)], check=True, timeout=90)


def test_a_broker_whose_name_is_unknown_is_no_stopped_broker() -> None:
    with pytest.raises(BrokerError, match=r"cannot find the address of that name \(.*\); check --broker and this"):
        Link("mqtt://no-such-host.invalid", "d", insecure=True).connect()


def test_an_identity_that_an_unencrypted_broker_ignores_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    Link("mqtt://127.0.0.1", "device", identity=Path("device.pem"))
    assert caplog.messages == ["--identity is not used for mqtt://127.0.0.1, which is unencrypted; use mqtts://"]


@needs_mosquitto
def test_a_message_of_the_largest_size_arrives_and_a_longer_one_is_reported(port: int, tmp_path: Path) -> None:
    link = connected(port, "largest", "largest")
    for size in (MAX_PAYLOAD, MAX_PAYLOAD + 1, 1):
        send(port, "largest/x", size, tmp_path / "payload")
    whole, longer, after = next_events(link, 3)
    link.close()
    assert whole == Received("largest/x", bytes(MAX_PAYLOAD))
    assert longer == Oversize("largest/x", MAX_PAYLOAD + 1)
    assert after == Received("largest/x", b"\0")


@needs_mosquitto
def test_100_megabytes_are_dropped_with_bounded_memory(port: int, tmp_path: Path) -> None:
    name = "huge-receiver"
    link = Link(f"mqtt://127.0.0.1:{port}", name)
    link.connect()
    link.subscribe("huge/#")
    assert link.next_event(10) == Connected()
    before = peak_rss()
    send(port, "huge/x", HUGE, tmp_path / "payload")
    assert link.next_event(60) == Oversize("huge/x", HUGE)
    assert peak_rss() - before < SPARE
    send(port, "huge/x", 3, tmp_path / "payload")
    assert link.next_event(10) == Received("huge/x", bytes(3))
    link.close()


def speak_websocket(listener: socket.socket, size: int) -> None:
    """A broker that sends its client one frame with a PUBLISH of `size` bytes, and a short one."""
    peer, _ = listener.accept()
    with peer:
        request = b""
        while b"\r\n\r\n" not in request:
            request += peer.recv(4096)
        key = next(line for line in request.decode().splitlines() if line.lower().startswith("sec-websocket-key"))
        digest = hashlib.sha1((key.split(": ")[1] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        accept = base64.b64encode(digest).decode()
        head = ("HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade")
        peer.sendall("\r\n".join([*head, f"Sec-WebSocket-Accept: {accept}", "\r\n"]).encode())
        peer.recv(4096)  # CONNECT
        peer.sendall(b"\x82\x04\x20\x02\x00\x00")  # CONNACK
        peer.sendall(b"\x89\x02hi")  # a ping of the WebSocket
        remaining, length = 3 + size, b""
        while True:  # MQTT's encoding of a length
            remaining, low = divmod(remaining, 128)
            length += bytes([low | (128 if remaining else 0)])
            if not remaining:
                break
        packet = b"\x30" + length + b"\x00\x01t"
        peer.sendall(b"\x82\x7f" + struct.pack("!Q", len(packet) + size) + packet)
        block = bytes(1 << 16)
        for start in range(0, size, len(block)):
            peer.sendall(block[: size - start])
        peer.sendall(b"\x82\x06\x30\x04\x00\x01tx")
        while peer.recv(4096):
            pass


def test_100_megabytes_in_one_websocket_frame_are_dropped_with_bounded_memory() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        speaker = threading.Thread(target=speak_websocket, args=(listener, HUGE), daemon=True)
        speaker.start()
        link = Link(f"ws://127.0.0.1:{listener.getsockname()[1]}", "frames")
        link.connect()
        before = peak_rss()
        assert next_events(link, 3) == [Connected(), Oversize("t", HUGE), Received("t", b"x")]
        assert peak_rss() - before < SPARE
        link.close()
        speaker.join(10)


@needs_mosquitto
def test_a_full_queue_holds_few_messages_and_loses_none(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_client, "_PAUSE_SECONDS", 3600)  # it is read on as soon as there is space
    sender, reader = connected(port, "sender"), connected(port, "reader", "flood")
    count = 3 * MAX_EVENTS
    for number in range(count):
        last = sender.publish("flood/x", str(number).encode())
    last.wait_for_publish(30)
    wait_until(lambda: reader.events.qsize() >= MAX_EVENTS, "a full queue")
    reader.publish("elsewhere", b"x")  # a full queue does not block publishing
    got = [event.payload for event in next_events(reader, count) if isinstance(event, Received)]
    assert got == [str(number).encode() for number in range(count)]
    sender.close()
    reader.close()


@needs_mosquitto
def test_a_full_queue_does_not_end_the_connection(port: int) -> None:
    """mosquitto disconnects a client that is silent for one and a half times its keepalive."""
    sender, reader = connected(port, "sender3"), connected(port, "reader3", "slow", keepalive=1)
    for number in range(2 * MAX_EVENTS):
        last = sender.publish("slow/x", str(number).encode())
    last.wait_for_publish(30)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        assert MAX_EVENTS <= reader.events.qsize() + 1 <= MAX_EVENTS + 1
        time.sleep(0.05)
    events = next_events(reader, 2 * MAX_EVENTS)
    assert events == [Received("slow/x", str(number).encode()) for number in range(2 * MAX_EVENTS)]
    assert not reader.outage.since
    sender.close()
    reader.close()


@needs_mosquitto
def test_every_reason_of_a_lost_connection_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The broker goes, comes back with another password, and at last with the right one."""
    caplog.set_level("INFO")
    passwords = tmp_path / "passwords"
    with Processes(tmp_path / "logs") as processes:
        lines = ["allow_anonymous false", f"password_file {passwords}"]
        passwords.write_text(password_line("u", "one"))
        broker = RestartableBroker(processes, tmp_path / "broker", lines=lines)
        link = Link(broker.url.replace("//", "//u:one@"), "reasons", reconnect=Backoff(first=1.0, longest=1.0))
        link.connect()
        broker.kill()
        wait_until(lambda: "refused" in link.outage.reason, "a refused connection")
        passwords.write_text(password_line("u", "two"))
        broker.start()
        wait_until(lambda: "Not authorized" in link.outage.reason, "the refused password")
        assert link.outage.since
        broker.kill()
        passwords.write_text(password_line("u", "one"))
        broker.start()
        wait_until(lambda: not link.outage.since, "the connection")
        link.close()
    assert caplog.messages == [
        "no connection to the broker (it closed the connection; check that it runs and that this identity has no "
        "other process); reconnecting",
        "no connection to the broker ([Errno 111] Connection refused; check that it runs); reconnecting",
        "no connection to the broker (Not authorized; check user, password and identity); reconnecting",
        "connected to the broker again",
    ]


@needs_mosquitto
def test_a_link_with_a_full_queue_closes(port: int) -> None:
    sender, reader = connected(port, "sender2"), connected(port, "reader2", "full")
    for number in range(2 * MAX_EVENTS):
        last = sender.publish("full/x", str(number).encode())
    last.wait_for_publish(30)
    wait_until(lambda: reader.events.qsize() >= MAX_EVENTS, "a full queue")
    closing = threading.Thread(target=reader.close, args=(reader.publish("full/bye", b"x"),))
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    sender.close()


@pytest.mark.parametrize(
    ("broker", "expected"),
    [
        ("mqtt://localhost", ("localhost", 1883, "", "")),
        ("mqtts://u:p%40ss@broker.example", ("broker.example", 8883, "u", "p@ss")),
        ("ws://127.0.0.1:9001/path", ("127.0.0.1", 9001, "", "")),
        ("wss://[::1]", ("::1", 443, "", "")),
    ],
)
def test_an_address_has_the_defaults_of_its_scheme(broker: str, expected: tuple[str, int, str, str]) -> None:
    address = parse_address(broker)
    assert (address.host, address.port, address.user, address.password) == expected


def test_user_and_password_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFMSL_USER", "kitchen")
    monkeypatch.setenv("FEDFMSL_PASSWORD", "secret")
    address = parse_address("mqtts://broker.example")
    assert (address.user, address.password) == ("kitchen", "secret")
    assert parse_address("mqtts://other@broker.example").user == "other"
    assert "secret" not in repr(address)


@pytest.mark.parametrize(
    "host",
    ["a..b", ".", ".a", "*", "a b", "a%20b", "a\x00b", "a\nb", "a" * 64, "a." * 127 + "a", "ü..", "\ud800", "[::1]x"],
)
def test_what_cannot_be_a_host_is_one_line_without_words_of_a_codec(host: str) -> None:
    for read in (lambda: parse_address(f"mqtt://{host}"), lambda: parse_listen(f"{host}:80")):
        with pytest.raises(ConfigError, match=r"no valid host name|not of the form|is not HOST:PORT") as caught:
            read()
        assert "codec" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["pi", "_pi.local", "a.b.", "küche", "10.0.0.1", "[::1]", "[fe80::1%eth0]"])
def test_names_and_addresses_of_machines_are_hosts(host: str) -> None:
    assert parse_address(f"mqtt://{host}:1884").port == parse_listen(f"{host}:1884")[1] == 1884


@pytest.mark.parametrize("port", ["", "0", "65536", "²", "٣", "-1", "9" * 5000])
def test_what_cannot_be_a_port_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        parse_listen(f"pi:{port}")


@pytest.mark.parametrize(
    "broker",
    ["http://me:se-cret@broker.example", "me:se-cret@broker.example", "mqtt://me:se-cret", "mqtt://me:1234cret"]
    + [f"mqtt://me:se{reserved}cret@broker.example:1883" for reserved in "#/?[] "]
    + [f"mqtt://me:se{reserved}cret" for reserved in "#?["],
)
def test_an_error_does_not_show_the_password_of_an_address(broker: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(broker)
    assert "cret" not in str(caught.value) and "1234" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        read_settings(ConnectionSettings, flags={"broker": broker}, environment=False)
    assert "cret" not in str(caught.value) and "1234" not in str(caught.value)


def test_the_remedy_for_a_password_with_reserved_characters_works(monkeypatch: pytest.MonkeyPatch) -> None:
    password = "p@ss:w/rd#1?%41 [&ü$"
    with pytest.raises(ConfigError, match=r"percent-encode it .*, or set FEDFMSL_USER and FEDFMSL_PASSWORD"):
        parse_address(f"mqtt://me:{password}@broker.example")
    assert parse_address(f"mqtt://me:{quote(password, safe='')}@broker.example").password == password
    assert parse_address("mqtt://me:a@b:c@broker.example").password == "a@b:c"
    monkeypatch.setenv("FEDFMSL_PASSWORD", password)
    assert parse_address("mqtt://me@broker.example").password == password


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "[::1]"])
def test_unencrypted_traffic_to_this_machine_is_allowed(host: str) -> None:
    Link(f"mqtt://{host}", "x")


@pytest.mark.parametrize("host", ["broker.example", "192.0.2.1", "localhost.example", "[2001:db8::1]", "0.0.0.0"])
@pytest.mark.parametrize("scheme", ["mqtt", "ws"])
def test_unencrypted_traffic_to_another_machine_needs_insecure(scheme: str, host: str) -> None:
    with pytest.raises(ConfigError, match=rf"would travel unencrypted; use {scheme}s:// with --identity, or allow"):
        Link(f"{scheme}://{host}", "x")
    Link(f"{scheme}://{host}", "x", insecure=True)
