"""Unauthorized clients, revoked devices and greedy ones at the bundle's HTTPS server."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import pytest
from support.processes import free_port, wait_until
from support.provisioned_fleet import write_identity

from devices.provisioning.authority import CLIENT, SERVER, make_authority
from edge_runtime.daemon.download import fetch_bundle, fetch_manifest
from fedfmsl.errors import BundleError, ConfigError, RunError
from fedfmsl.protocol.bundle import MANIFEST, Bundle
from fedfmsl.protocol.messages import ServerStatus
from fedfmsl.transport.identity import client_context
from fedfmsl.transport.listening import listen
from fedfmsl.transport.server_contexts import ServerContexts
from trainer_server.service.bundle_files import Served, read_request, respond
from trainer_server.service.bundle_http import BundleServer
from trainer_server.service.bundle_process import WAITING, Limits, Server

OURS = make_authority("ours")


class Fleet:
    """The bundle's server and its members' identities. `url` and `port` of the server."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        issued = {name: OURS.issue(name, [CLIENT]) for name in ("device", "lost")}
        self.devices = {name: write_identity(folder / f"{name}.pem", one, OURS) for name, one in issued.items()}
        self.serial = issued["lost"].certificate.serial_number
        self.identity = write_identity(folder / "server.pem", OURS.issue("server", [SERVER], ["localhost"]), OURS)
        self.revoked = folder / "revoked.crl"
        self.revoked.write_text(OURS.revocation_list([]))
        self.port, self.bundle, self.folder = free_port(), Bundle.load(bundle), folder
        self.server = BundleServer(bundle, f"localhost:{self.port}", self.identity)

    def status(self, url: str) -> ServerStatus:
        return ServerStatus(online=True, run="x", session="1", bundle=self.bundle.sha256, bundle_url=url)

    def fetch(self, name: str) -> Bundle:
        return fetch_bundle(
            self.status(self.server.url), self.folder / "fetched" / name, self.devices[name], retry_delays=(0.0,)
        )

    def open(self, name: str) -> ssl.SSLSocket:
        """A connection after the TLS handshake."""
        raw = socket.create_connection(("localhost", self.port), 10)
        return client_context(self.devices[name]).wrap_socket(raw, server_hostname="localhost")


@pytest.fixture
def fleet(tmp_path: Path, bundle: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path, bundle)
    yield made
    made.server.close()


def descriptors(process: int | str) -> int:
    return sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())


def test_a_thousand_bare_connections_take_no_descriptor_of_the_coordinator(fleet: Fleet) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with ExitStack() as bare:
        before = descriptors("self")
        for _ in range(1100):
            bare.enter_context(socket.create_connection(("localhost", fleet.port), 10))
        mine = descriptors("self") - before - 1100  # this process is the coordinator's
        pid = fleet.server.pid
        wait_until(lambda: descriptors(pid) <= WAITING + 20, "ended connections")
        fleet.fetch("device").verify()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert mine <= 0


def test_a_revoked_device_is_refused_at_once_and_without_a_restart(fleet: Fleet) -> None:
    fleet.fetch("lost").verify()
    shutil.rmtree(fleet.folder / "fetched" / "lost")
    fleet.revoked.write_text(OURS.revocation_list([fleet.serial]))
    with pytest.raises(BundleError, match="our certificate is revoked"):
        fleet.fetch("lost")
    fleet.fetch("device").verify()


def test_a_device_that_is_not_allowed_gets_no_file(fleet: Fleet, bundle: Path) -> None:
    fleet.server.close()
    fleet.server = BundleServer(bundle, f"localhost:{fleet.port}", fleet.identity, allowed=frozenset({"device"}))
    fleet.fetch("device").verify()
    with pytest.raises(BundleError, match="HTTP 403"):
        fleet.fetch("lost")


def test_a_revocation_list_that_is_none_is_named(fleet: Fleet, bundle: Path) -> None:
    with pytest.raises(ConfigError, match="is no readable revocation list"):
        BundleServer(bundle, "localhost:1", fleet.identity, revoked=bundle / "manifest.json")
    fleet.revoked.write_text("half of a file")  # while it is copied
    fleet.fetch("device").verify()


@pytest.fixture
def large(tmp_path: Path) -> Served:
    path = tmp_path / "large"
    path.write_bytes(bytes(30_000_000))
    return Served(path, "0" * 64)


@contextmanager
def serving(
    fleet: Fleet, large: Served, limits: Limits, files: Mapping[str, Served] = MappingProxyType({})
) -> Iterator[Server]:
    """A server in this process instead of the fleet's, which serves a large file."""
    listeners, (end, ended) = listen("--serve", "localhost", 0)[:1], os.pipe()
    fleet.port = listeners[0].getsockname()[1]
    server = Server(
        {**files, "large": large}, ServerContexts(fleet.identity, fleet.revoked, pytest.fail), listeners, limits=limits
    )
    thread = threading.Thread(target=server.serve, args=(end,))
    thread.start()
    try:
        yield server
    finally:
        os.write(ended, b"x")
        thread.join()
        for descriptor in (end, ended):
            os.close(descriptor)
        listeners[0].close()


REQUEST = b"GET /bundle/large HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"GET /bundle/large HTTP/1.1\r\nX: ", REQUEST], ids=["none", "half", "whole"])
def test_a_client_that_sends_no_request_or_reads_nothing_is_ended(fleet: Fleet, large: Served, sent: bytes) -> None:
    with serving(fleet, large, Limits(answer=0.3, block=0.3)) as server, fleet.open("device") as connection:
        connection.sendall(sent)
        wait_until(lambda: bool(server.ended), "the end of the connection")
        received = 0
        with suppress(OSError):
            while block := connection.recv(1 << 20):
                received += len(block)
        assert received < large.path.stat().st_size


def test_a_connection_without_a_thread_is_ended_and_not_the_server(
    fleet: Fleet, large: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with serving(fleet, large, Limits()) as server:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)  # before the server accepts the connection
            connection = socket.create_connection(("localhost", fleet.port), 10)
            assert connection.recv(1) == b"" and server.ended == {"no more threads": 1}
        with fleet.open("device") as connection:
            connection.sendall(REQUEST)
            assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(("host", "says"), [("no-such-host.invalid", "is no name or address"), ("localhost", "in use")])
def test_an_address_that_cannot_be_listened_on_is_named_with_its_reason(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, host: str, says: str
) -> None:
    with socket.create_server(("localhost", 0)) as taken, pytest.raises(RunError, match=f"{says}.*; choose another"):
        BundleServer(bundle, f"{host}:{taken.getsockname()[1]}", insecure=True)


def test_a_client_has_four_transfers_at_a_time(fleet: Fleet, large: Served) -> None:
    with serving(fleet, large, Limits()), ExitStack() as slow:
        for status in (200, 200, 200, 200, 429):
            connection = slow.enter_context(fleet.open("device"))
            connection.sendall(REQUEST)
            assert connection.recv(12) == b"HTTP/1.1 %d" % status


def test_a_device_waits_for_a_busy_server_and_its_check_does_not(
    fleet: Fleet, large: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = {MANIFEST: fleet.bundle.sha256, **{name: each.sha256 for name, each in fleet.bundle.manifest.files.items()}}
    files = {name: Served(fleet.bundle.root / name, sha256) for name, sha256 in names.items()}
    with serving(fleet, large, Limits(transfers=1), files), fleet.open("lost") as slow:
        slow.sendall(REQUEST)
        assert slow.recv(12) == b"HTTP/1.1 200"
        status = fleet.status(f"https://localhost:{fleet.port}/bundle")
        with pytest.raises(BundleError, match="HTTP 503"):
            fetch_manifest(status, tmp_path / "check", fleet.devices["device"])
        fetch_bundle(status, tmp_path / "device", fleet.devices["device"], slow.close, busy_seconds=0.0).verify()
    assert "the server is busy (HTTP 503); waiting to fetch manifest.json" in caplog.text


def test_a_client_may_fetch_the_bundle_four_times(fleet: Fleet, large: Served) -> None:
    statuses = []
    with serving(fleet, large, Limits(bundle_seconds=1e9)):
        for _ in range(6):
            with fleet.open("device") as connection:
                connection.sendall(REQUEST)
                statuses.append(connection.recv(12)[-3:])
                with suppress(OSError):
                    while connection.recv(1 << 20):
                        pass
    assert statuses == [b"200"] * 4 + [b"429"] * 2


def test_a_process_that_ends_is_started_again(fleet: Fleet, bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    fleet.server.close()
    fleet.server = BundleServer(bundle, f"localhost:{fleet.port}", fleet.identity, restart_seconds=0.0)
    first = fleet.server.pid
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: fleet.server.pid != first, "the second process")
    fleet.fetch("device").verify()
    assert "starting it again" in caplog.text


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /\r\n", b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/2\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 9000],
)
def test_what_is_no_request_is_refused(sent: bytes) -> None:
    blocks = [sent, b""]
    with pytest.raises(ValueError):
        read_request(lambda size: blocks.pop(0)[:size])


@pytest.mark.parametrize(
    ("wanted", "status", "body"),
    [("bytes=2-", 206, b"cde"), ("bytes=1-2", 206, b"bc"), ("bytes=5-", 416, b"Re"), ("bytes=-2", 200, b"abcde")],
)
def test_ranges(tmp_path: Path, wanted: str, status: int, body: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abcde")
    request = read_request(lambda size: f"GET /bundle/file HTTP/1.1\r\nRange: {wanted}\r\n\r\n".encode())
    sent = b"".join(respond(request, {"file": Served(file, "0" * 64)}).blocks())
    head, _, rest = sent.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()) and rest[: len(body)] == body
