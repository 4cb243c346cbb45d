"""A provisioned fleet on a real mosquitto: only members can connect, and only to their own topics."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from support.processes import RUN_SECONDS, Broker, Ended, Federation, Processes, free_port, run_module, wait_until
from support.provisioned_fleet import (
    HOSTS,
    LONG_AGO,
    Fleet,
    authority_of,
    expired_identity,
    foreign_identity,
    home_assistant,
    provision,
    start_fleet,
    write_identity,
)

from devices.provisioning.authority import SERVER, make_authority
from devices.provisioning.settings_file import read_table
from edge_runtime.inference.home_assistant import DeviceDescription, discovery_message
from fedfmsl.errors import BrokerError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.topics import Topics, discovery_topic
from fedfmsl.transport.address import parse_address
from fedfmsl.transport.identity import read_identity
from fedfmsl.transport.link import Connected, Disconnected, Link, LinkEvent, Received
from fedfmsl.transport.settings import HOME_ASSISTANT
from trainer_server.service.purge import purge

pytestmark = pytest.mark.needs("mosquitto")

BROKER = 6
DEVICES = ("device-0", "device-1", "mallory")
TOPICS = Topics("orchard")
LAST = b"the last message"  # a message that has not arrived before it was not delivered


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with Processes(tmp_path_factory.mktemp("logs")) as started:
        yield started


@pytest.fixture(scope="module")
def fleet(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A fleet of three devices and a revoked one."""
    pki = tmp_path_factory.mktemp("fleet") / "pki"
    provision(pki, *HOSTS, *DEVICES, "lost", HOME_ASSISTANT)
    shutil.copy(pki / "devices" / "lost.toml", pki / "lost.toml")
    provision(pki, "--revoke", "lost")
    return start_fleet(pki, processes)


@pytest.fixture
def connect(fleet: Fleet) -> Iterator[Callable[..., Link]]:
    """Connects members by name, and closes their links afterwards."""
    links: list[Link] = []

    def connected(name: str, client_id: str = "", url: str = "") -> Link:
        identity = fleet.server if name == "server" else fleet.device(name)
        identity = home_assistant(fleet.pki) if name == HOME_ASSISTANT else identity
        link = Link(url or fleet.url, client_id or name, identity=identity)
        links.append(link)
        link.connect()
        assert isinstance(link.next_event(10), Connected)
        return link

    yield connected
    for link in links:
        link.close()


def until_last(link: Link) -> list[LinkEvent]:
    """Events before the last message."""
    events: list[LinkEvent] = []
    while True:
        event = link.next_event(10)
        assert event is not None, f"the last message did not come, but {events}"
        if isinstance(event, Received) and event.payload == LAST:
            return events
        events.append(event)


def publish(link: Link, topic: str, payload: bytes = b"x", retain: bool = False) -> None:
    link.publish(topic, payload, retain).wait_for_publish(10)


def attempt(connect: Callable[..., Link], name: str, topic: str, allowed: str) -> None:
    """Publishes on a new connection. The broker has processed the message once it acknowledges an allowed one after it
    or ends the connection, as mosquitto 2.0 does."""
    link = connect(name)
    link.publish(topic, b"x", retain=True, qos=0)
    after = link.publish(allowed, b"x")
    wait_until(
        lambda: after.rc > 0 or after.is_published() or isinstance(link.next_event(0), Disconnected), f"{topic} denied"
    )
    link.close()


def introduction(device: str) -> str:
    """The topic on which a daemon announces its device to Home Assistant."""
    return discovery_message(
        "homeassistant", DeviceDescription(TOPICS, device, ["apple"]), TOPICS.status(device), health=True
    )[0]


def join(url: str, photos: Path, state: Path, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
    """Runs the device's command to its end."""
    command = ("run", "--run", "orchard", "--images", str(photos), "--broker", url, "--state", str(state))
    return run_module("edge_runtime", *command, *arguments, environment=environment)


def coordinate(url: str, bundle: Path, out: Path, *arguments: str) -> Ended:
    command = (
        "start",
        "--run",
        "orchard",
        "--bundle",
        str(bundle),
        "--broker",
        url,
        "--out",
        str(out),
        "--devices",
        "1",
    )
    return run_module("trainer_server", *command, *arguments)


UNAUTHORIZED: dict[str, tuple[Callable[[Fleet, Path], Path], str]] = {
    "nobody": (
        lambda fleet, folder: write_identity(folder / "x.pem", None, authority_of(fleet.pki)),
        "it asks for a certificate; give one with --identity",
    ),
    "another CA's": (lambda fleet, folder: foreign_identity(fleet.pki, folder / "x.pem"), "another CA"),
    "expired": (lambda fleet, folder: expired_identity(fleet.pki, folder / "x.pem"), "our certificate has expired"),
    "revoked": (lambda fleet, folder: fleet.pki / "lost.toml", "our certificate is revoked"),
}


@pytest.mark.parametrize("client", UNAUTHORIZED)
def test_an_unauthorized_device_is_refused_in_one_line(
    fleet: Fleet, photos: dict[str, Path], tmp_path: Path, client: str
) -> None:
    make, says = UNAUTHORIZED[client]
    ended = join(fleet.url, photos["device-0"], tmp_path / "state", "--identity", str(make(fleet, tmp_path)))
    ended.assert_error(BROKER, f"MQTT broker at localhost:{fleet.port} refused the connection", says)


@pytest.mark.parametrize("client", ["nobody", "revoked"])
def test_an_unauthorized_server_is_refused_in_one_line(fleet: Fleet, bundle: Path, tmp_path: Path, client: str) -> None:
    make, says = UNAUTHORIZED[client]
    ended = coordinate(fleet.url, bundle, tmp_path / "out", "--identity", str(make(fleet, tmp_path)))
    ended.assert_error(BROKER, f"MQTT broker at localhost:{fleet.port} refused the connection", says)


def test_a_broker_of_another_ca_is_not_trusted(fleet: Fleet, photos: dict[str, Path], tmp_path: Path) -> None:
    other = write_identity(tmp_path / "ca.pem", None, make_authority("another fleet"))
    ended = join(fleet.url, photos["device-0"], tmp_path / "state", "--identity", str(other))
    ended.assert_error(BROKER, "cannot trust the MQTT broker", "not of the identity file's CA", "--identity")


def test_without_an_identity_file_the_broker_is_not_trusted(
    fleet: Fleet, photos: dict[str, Path], tmp_path: Path
) -> None:
    ended = join(fleet.url, photos["device-0"], tmp_path / "state")
    ended.assert_error(BROKER, "cannot trust the MQTT broker", "--identity")


def test_a_broker_with_another_name_than_in_its_certificate_is_not_trusted(
    fleet: Fleet, photos: dict[str, Path], tmp_path: Path
) -> None:
    url = f"mqtts://127.0.0.2:{fleet.port}"
    ended = join(url, photos["device-0"], tmp_path / "state", "--identity", str(fleet.device("device-0")))
    ended.assert_error(BROKER, "cannot trust the MQTT broker", "of another address", "--host")


def test_a_broker_with_an_expired_certificate_is_not_trusted(fleet: Fleet, tmp_path: Path) -> None:
    pki = shutil.copytree(fleet.pki, tmp_path / "pki")
    issued = authority_of(pki).issue("localhost", [SERVER], ["localhost"], days=30, now=LONG_AGO)
    (pki / "broker" / "broker.crt").write_text(issued.certificate_pem)
    (pki / "broker" / "broker.key").write_text(issued.key_pem)
    conf = pki / "broker" / "mosquitto.conf"
    conf.write_text(conf.read_text().replace(str(fleet.pki), str(pki)))
    with Processes(tmp_path / "logs") as processes:
        expired = start_fleet(pki, processes)
        with pytest.raises(BrokerError, match=r"its certificate has expired; renew it, or set this machine's clock"):
            Link(expired.url, "device-0", identity=fleet.device("device-0")).connect()


def test_the_identity_of_the_server_does_not_pass_for_the_broker(fleet: Fleet, tmp_path: Path) -> None:
    pki = shutil.copytree(fleet.pki, tmp_path / "pki")
    stolen = (pki / "server.pem").read_text()
    (pki / "broker" / "broker.crt").write_text(stolen[stolen.index("-----BEGIN CERTIFICATE") :])
    (pki / "broker" / "broker.key").write_text(stolen[: stolen.index("-----BEGIN CERTIFICATE")])
    conf = pki / "broker" / "mosquitto.conf"
    conf.write_text(conf.read_text().replace(str(fleet.pki), str(pki)))
    with Processes(tmp_path / "logs") as processes:
        false = start_fleet(pki, processes)
        for url in (false.url, false.websocket_url):
            with pytest.raises(BrokerError, match="its certificate is that of the run's server"):
                Link(url, "device-0", identity=fleet.device("device-0")).connect()


def test_renewed_certificates_count_after_a_reload_and_cut_no_connection(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "kitchen", "lost")
    earlier = Path(shutil.copy(pki / "devices" / "kitchen.toml", tmp_path / "kitchen.toml"))
    with Processes(tmp_path / "logs") as processes:
        fleet = start_fleet(pki, processes)
        link, serial = Link(fleet.url, "kitchen", identity=earlier), served_serial(fleet)
        link.connect()
        assert isinstance(link.next_event(10), Connected)
        assert link.own_until - time.time() > 800 * 86400 and link.broker_until - time.time() > 800 * 86400
        provision(pki, "--renew", "kitchen", "--renew", "broker", "--renew", "server")
        processes.started["mosquitto"].send_signal(signal.SIGHUP)
        wait_until(lambda: served_serial(fleet) != serial, "the new certificate of the broker")
        publish(link, TOPICS.status("kitchen"))
        assert link.next_event(0) is None  # the connection was not cut
        for identity in (fleet.device("kitchen"), earlier):
            again = Link(fleet.url, "kitchen", identity=identity)
            again.connect()
            again.close()
        link.close()


def served_serial(fleet: Fleet) -> int:
    """Serial number of the broker's certificate."""
    context = read_identity(fleet.device("lost")).client_context()
    with socket.create_connection(("localhost", fleet.port), 10) as raw:
        found = context.wrap_socket(raw, server_hostname="localhost").getpeercert()
        assert found
        return int(str(found["serialNumber"]), 16)


def test_a_port_without_tls_is_named(broker: Broker, fleet: Fleet) -> None:
    with pytest.raises(BrokerError, match="start one with TLS"):
        Link(broker.url.replace("mqtt:", "mqtts:"), "x", identity=fleet.device("device-0")).connect()


@pytest.mark.parametrize("restart", [False, True], ids=["reloaded", "restarted"])
def test_a_revoked_identity_is_refused_once_the_broker_was(tmp_path: Path, restart: bool) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "stolen")
    stolen = Path(shutil.copy(pki / "devices" / "stolen.toml", tmp_path / "stolen.toml"))
    with Processes(tmp_path / "before") as before, Processes(tmp_path / "after") as after:
        fleet = start_fleet(pki, before)
        link = Link(fleet.url, "stolen", identity=stolen)
        link.connect()
        link.close()
        provision(pki, "--revoke", "stolen")
        provision(pki, "stolen")  # the name can be used again
        if restart:
            before.started["mosquitto"].end()
            fleet = start_fleet(pki, after)
        else:
            before.started["mosquitto"].send_signal(signal.SIGHUP)
            wait_until(lambda: "Reloading config" in before.started["mosquitto"].stderr, "the reload")
        with pytest.raises(BrokerError, match="our certificate is revoked"):
            Link(fleet.url, "stolen", identity=stolen).connect()
        link = Link(fleet.url, "stolen", identity=fleet.device("stolen"))
        link.connect()
        link.close()


def test_a_device_cannot_publish_for_another_one(connect: Callable[..., Link]) -> None:
    server = connect("server")
    server.subscribe("#")
    for topic in (
        TOPICS.update_chunk("device-0", 1, 0),
        TOPICS.status("device-0"),
        TOPICS.progress("device-0"),
        TOPICS.health("device-0"),
        TOPICS.prediction("device-0"),
        TOPICS.ack("device-0"),
        TOPICS.ack("mallory"),
        TOPICS.round,
        TOPICS.server_status,
        TOPICS.globals_chunk("0" * 64, 0),
        "fedfmsl/orchard/devices/mallory/else",
        "elsewhere",
    ):
        attempt(connect, "mallory", topic, TOPICS.progress("mallory"))
    mallory, mine = connect("mallory"), [TOPICS.update_chunk("mallory", 1, 0)]
    mine += [TOPICS.progress("mallory"), TOPICS.health("mallory"), TOPICS.prediction("mallory")]
    for topic in mine:
        publish(mallory, topic)
    publish(mallory, TOPICS.status("mallory"), LAST)
    assert {event.topic for event in until_last(server) if isinstance(event, Received)} == set(mine)


def test_a_device_announces_only_itself_to_home_assistant(connect: Callable[..., Link]) -> None:
    home, device = connect(HOME_ASSISTANT), connect("device-0")
    home.subscribe("#")
    for topic in (
        introduction("device-0"),
        introduction("mallory").replace("/config", "/else"),
        "homeassistant/sensor/orchard/mallory/config",
        "homeassistant/status",
    ):
        attempt(connect, "mallory", topic, TOPICS.progress("mallory"))
    mine = [introduction("device-0"), TOPICS.prediction("device-0"), TOPICS.prediction_status("device-0")]
    mine += [TOPICS.health("device-0")]
    for topic in (*mine, TOPICS.update_chunk("device-0", 1, 0)):  # Home Assistant may not read the last one
        publish(device, topic)
    publish(device, TOPICS.status("device-0"), LAST)
    assert [event.topic for event in until_last(home) if isinstance(event, Received)] == mine


def test_the_operator_removes_all_that_an_old_run_has_left_beside_a_running_server(
    fleet: Fleet, connect: Callable[..., Link]
) -> None:
    topics, device, server = Topics("old"), connect("device-0"), connect("server")
    server.subscribe("#")
    announcement = discovery_topic("homeassistant", "old", "device-0")
    for topic in (topics.status("device-0"), topics.prediction("device-0"), announcement):
        publish(device, topic, retain=True)
    assert purge(Link(fleet.url, "purge", identity=fleet.pki / "operator.pem"), topics, "homeassistant") == 3
    publish(device, TOPICS.update_chunk("device-0", 1, 0), LAST)
    assert not any(isinstance(event, Disconnected) for event in until_last(server))


def test_home_assistant_reads_and_writes_only_its_topics(connect: Callable[..., Link]) -> None:
    server, device = connect("server"), connect("device-0")
    for link in (server, device):
        link.subscribe("#")
    for topic in (TOPICS.round, TOPICS.status("device-0"), introduction("device-0")):
        attempt(connect, HOME_ASSISTANT, topic, "homeassistant/status")
    home = connect(HOME_ASSISTANT)
    home.subscribe("homeassistant/status")
    publish(home, "homeassistant/status", LAST)
    assert until_last(home) == []
    publish(server, TOPICS.ack("device-0"), LAST)
    assert until_last(device) == []
    publish(device, TOPICS.update_chunk("device-0", 1, 0), LAST)
    assert [event for event in until_last(server) if isinstance(event, Received)] == []


def test_a_device_receives_no_message_of_another_one(connect: Callable[..., Link]) -> None:
    server, device, mallory = connect("server"), connect("device-0"), connect("mallory")
    for pattern in ("#", "fedfmsl/+/devices/+/ack", TOPICS.ack("device-0"), TOPICS.update_chunk("device-0", "+", "+")):
        mallory.subscribe(pattern)
    publish(mallory, TOPICS.progress("mallory"))  # its acknowledgement follows those of the subscriptions
    publish(device, TOPICS.update_chunk("device-0", 1, 0))
    publish(device, TOPICS.status("device-0"))
    publish(server, TOPICS.ack("device-0"))
    publish(server, TOPICS.round)
    publish(server, TOPICS.globals_chunk("0" * 64, 0))
    publish(server, TOPICS.ack("mallory"), LAST)
    topics = {event.topic for event in until_last(mallory) if isinstance(event, Received)}
    assert topics == {TOPICS.round, TOPICS.globals_chunk("0" * 64, 0)}


@pytest.mark.parametrize("client_id", ["device-0", "fedfmsl-orchard-device-0"])
def test_a_client_id_of_another_device_does_not_end_its_connection(
    connect: Callable[..., Link], client_id: str
) -> None:
    device, server = connect("device-0", "fedfmsl-orchard-device-0"), connect("server")
    device.subscribe(TOPICS.ack("device-0"))
    mallory = connect("mallory", client_id)
    publish(server, TOPICS.ack("device-0"), LAST)
    assert until_last(device) == []
    publish(server, TOPICS.ack("mallory"), LAST)
    assert mallory.next_event(0.2) is None  # the subscriptions were not taken over either


def test_a_last_will_for_another_device_is_not_delivered(fleet: Fleet, connect: Callable[..., Link]) -> None:
    server = connect("server")
    server.subscribe(TOPICS.status("+"))
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "mallory")
    client.tls_set_context(read_identity(fleet.device("mallory")).client_context())
    client.will_set(TOPICS.status("device-0"), b"gone", qos=1, retain=True)
    connected = threading.Event()
    client.on_connect = lambda *_: connected.set()
    client.connect("localhost", fleet.port)
    client.loop_start()
    assert connected.wait(10)
    client.loop_stop()
    connection = client.socket()
    assert connection is not None
    connection.shutdown(socket.SHUT_RDWR)  # without DISCONNECT, so the broker publishes the last will
    publish(connect("mallory"), TOPICS.status("mallory"), LAST)
    assert until_last(server) == []


def test_a_device_name_must_be_the_one_in_its_identity(fleet: Fleet, photos: dict[str, Path], tmp_path: Path) -> None:
    ended = join(
        fleet.url,
        photos["device-0"],
        tmp_path / "state",
        *("--identity", str(fleet.device("device-0")), "--device", "device-1"),
    )
    ended.assert_error(2, "--device 'device-1'", "'device-0'", "omit --device")


def test_messages_travel_over_a_websocket(fleet: Fleet, connect: Callable[..., Link]) -> None:
    server, device = connect("server"), connect("device-0", url=fleet.websocket_url)
    server.subscribe(TOPICS.update_chunk("+", "+", "+"))
    device.subscribe(TOPICS.round)
    chunk = bytes(range(256)) * 400
    publish(device, TOPICS.update_chunk("device-0", 1, 0), chunk)
    publish(device, TOPICS.update_chunk("device-0", 1, 1), LAST)
    assert until_last(server) == [Received(TOPICS.update_chunk("device-0", 1, 0), chunk)]
    publish(server, TOPICS.round, chunk)
    publish(server, TOPICS.round, LAST)
    assert until_last(device) == [Received(TOPICS.round, chunk)]


def test_a_user_needs_its_password(photos: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pki = tmp_path / "pki"
    printed = provision(pki, *HOSTS, "--user", "device-0", "device-1").stdout
    provision(pki, "--user", "late")
    passwords = {path.stem: parse_address(read_table(path)["broker"]).password for path in pki.glob("devices/*.toml")}
    assert set(passwords) == {"device-0", "device-1", "late"}
    (passwords["server"],) = (line.split()[1] for line in printed.splitlines() if line.startswith("server "))
    provision(pki, "--revoke", "device-1")
    with Processes(tmp_path / "logs") as processes:
        fleet = start_fleet(pki, processes)
        authority = pki / "ca.crt"
        links = {}
        for name in ("server", "late"):
            monkeypatch.setenv("FEDFMSL_USER", name)
            monkeypatch.setenv("FEDFMSL_PASSWORD", passwords[name])
            links[name] = Link(fleet.url, name, identity=authority)
            links[name].connect()
        links["server"].subscribe("#")
        links["late"].publish(TOPICS.status("device-0"), b"x", qos=0)  # with QoS 1 the broker would end the connection
        publish(links["late"], TOPICS.status("late"), LAST)
        assert until_last(links["server"]) == [Connected()]
        for link in links.values():
            link.close()
        for user, password in (("device-0", "guessed"), ("device-1", passwords["device-1"]), ("", "")):
            ended = join(
                fleet.url,
                photos["device-0"],
                tmp_path / "state",
                *("--identity", str(authority)),
                environment={"FEDFMSL_USER": user, "FEDFMSL_PASSWORD": password},
            )
            ended.assert_error(BROKER, "refused the connection: Not authorized; check user, password and identity")


def test_a_kits_path_may_contain_a_space_and_a_number_sign(tmp_path: Path) -> None:
    pki = tmp_path / "our #1 pki"
    provision(pki, *HOSTS, "device-0")
    with Processes(tmp_path / "logs") as processes:
        fleet = start_fleet(pki, processes)
        link = Link(fleet.url, "device-0", identity=fleet.device("device-0"))
        link.connect()
        link.close()


def test_a_whole_run_over_mutual_tls(
    fleet: Fleet, bundle: Path, photos: dict[str, Path], processes: Processes, tmp_path: Path
) -> None:
    """With secure sums, whose keys the certificates of the devices sign."""
    mine = dict(zip(DEVICES, photos.values(), strict=True))
    federation = Federation("orchard", Broker("mosquitto", fleet.url), bundle, mine, tmp_path, processes)
    server = federation.start_server(
        *("--identity", str(fleet.server), "--serve", f"localhost:{free_port()}"),
        *("--stage1-rounds", "1", "--stage2-rounds", "1", "--secure-sums"),
    )
    for name in mine:
        federation.start_device(name, "--identity", str(fleet.device(name)))
    for name, device in federation.devices.items():
        ended = device.wait(RUN_SECONDS)
        assert ended.code == 0, f"{name}: {ended.stderr}"
        assert "without a certificate" not in ended.stdout + ended.stderr
        Bundle.load(federation.state(name) / "bundles" / Bundle.load(bundle).sha256).verify()
    assert server.wait().code == 0
    (keys,) = (line for line in federation.rounds() if line["round"]["stage"] == "keys")
    assert set(keys["updates"]) == set(mine)
    assert min(keys["bytes_up"].values()) > 500  # certificate and signature
    assert not any(line["missing"] or line["repeated"] for line in federation.rounds())
