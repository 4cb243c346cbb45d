"""The base of all web pages: who may use it, what a browser may load, and that a hostile client does no harm."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from support.provisioned_fleet import write_identity
from support.web import ask, csrf_of

from devices.provisioning.authority import CLIENT, CONSOLE, SERVER, Authority, Issued, make_authority
from fedfmsl.common.files import write_atomically
from fedfmsl.common.token_file import stored_token
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.transport import listening
from fedfmsl.transport.identity import client_context
from fedfmsl.transport.listening import listen
from fedfmsl.web import gate, serve
from fedfmsl.web.access import Access, RateLimit
from fedfmsl.web.application import application, page
from fedfmsl.web.serve import Context, WebServer, page_context
from fedfmsl.web.stream import stream

TOKEN = "a token of enough characters"
HOSTILE = "<script>alert(1)</script>"


async def _show(request: Request) -> Response:
    if request.method == "POST":
        return Response(f"{request.state.form['name']}{request.scope['operator']}")
    return page(request, "error.html", title="Devices", reason=HOSTILE)


async def _live(request: Request) -> Response:
    return stream(lambda: {"a": f"<p id='a'>{next(COUNT)}</p>", "b": "<p id='b'></p>"}, seconds=0.01)


async def _faulty(request: Request) -> Response:
    raise ZeroDivisionError


async def _slow(request: Request) -> Response:
    return stream(lambda: {"a": "<p id='a'></p>"}, seconds=60.0)


COUNT = iter(range(1000))
ROUTES = [
    Route("/", _show, methods=["GET", "POST"]),
    Route("/live", _live),
    Route("/slow", _slow),
    Route("/faulty", _faulty),
]


def start(tmp_path: Path, token: str | None = None, context: Context | None = None) -> WebServer:
    listeners = listen("--page", "127.0.0.1", 0)
    access = Access("localhost", listeners[0].getsockname()[1], token, encrypted=context is not None)
    return WebServer(application("Test", ROUTES, access, tmp_path), listeners, context)


@dataclass(frozen=True)
class Certified:
    """A fleet's CA, and the certificates of its members, of which "former" is revoked."""

    folder: Path
    authority: Authority
    issued: Mapping[str, Issued]

    def revoke(self, *names: str) -> None:
        serials = [self.issued[name].certificate.serial_number for name in names]
        write_atomically(self.folder / "revoked.crl", self.authority.revocation_list(serials).encode(), durable=False)

    def context(self, name: str) -> ssl.SSLContext:
        """Of a client with this certificate."""
        return client_context(write_identity(self.folder / f"client-{name}.pem", self.issued.get(name), self.authority))

    def server(self) -> Context:
        server = write_identity(self.folder / "server.pem", self.issued["server"], self.authority)
        found = page_context("0.0.0.0", server, clients=ssl.CERT_OPTIONAL)
        assert found
        return found


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    authority = make_authority("fleet")
    operators = {
        name: authority.issue("operator", [CLIENT, CONSOLE], unit=unit)
        for name, unit in (("operator", ""), ("anna", "anna"), ("former", "former"))
    }
    issued = {
        "server": authority.issue("server", [SERVER, CLIENT], ["localhost"]),
        "device": authority.issue("device", [CLIENT]),
        "operator-by-name": authority.issue("operator", [CLIENT]),
        **operators,
    }
    return Certified(tmp_path_factory.mktemp("pki"), authority, issued)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[WebServer]:
    with start(tmp_path) as server:
        yield server


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[WebServer]:
    with start(tmp_path, TOKEN) as server:
        yield server


def test_a_page_escapes_texts_and_allows_no_scripts_but_its_own(site: WebServer) -> None:
    status, text, headers = ask(site)
    assert status == 200
    assert HOSTILE not in text
    assert "&lt;script&gt;" in text
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store"
    assert ask(site, "/static/live.js")[0] == 200
    assert ask(site, "/static/../access.py")[0] == ask(site, "/nowhere")[0] == 404
    assert "/nowhere is no page here." in ask(site, "/nowhere")[1]
    status, text, faulty = ask(site, "/faulty")
    assert (status, faulty["content-security-policy"]) == (500, policy)
    assert "This page has a fault" in text


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "192.168.1.5", "", "[", "localhost.evil.example"]
)
def test_a_page_on_a_loopback_address_has_no_other_name(site: WebServer, host: str) -> None:
    assert ask(site, Host=host)[0] == 400
    assert ask(site, Host=f"localhost:{site.port}")[0] == 200


def test_a_form_needs_the_csrf_token_and_the_same_origin(site: WebServer) -> None:
    good = {"csrf": csrf_of(ask(site)[1]), "name": "kitchen"}
    own = f"http://127.0.0.1:{site.port}"
    assert ask(site, form=good, Origin=own)[:2] == (200, "kitchen")
    assert ask(site, form=good, Origin="http://evil.example")[0] == 403
    assert ask(site, form=good, Origin="null")[0] == 403
    assert ask(site, form=good, Content_Type="text/plain")[0] == 415
    for wrong in ("", "0" * 64, "é"):
        assert ask(site, form=good | {"csrf": wrong})[0] == 403
    assert ask(site, form="csrf=" + "x" * 100_000)[0] == 413
    assert ask(site, form="&".join(f"a{i}=" for i in range(5000)))[0] == 413
    assert ask(site, method="DELETE")[0] == 405


def test_a_guarded_page_opens_with_the_token_only(guarded: WebServer) -> None:
    status, _, headers = ask(guarded)
    assert (status, headers["location"]) == (303, "/sign-in")
    assert ask(guarded, "/live", Accept="text/event-stream")[0] == 401
    form = {"csrf": csrf_of(ask(guarded, "/sign-in")[1])}
    assert ask(guarded, "/", form=form | {"name": "x"})[0] == 401
    assert ask(guarded, "/sign-in", form=form | {"token": "wrong"})[0] == 403
    status, _, headers = ask(guarded, "/sign-in", form=form | {"token": TOKEN})
    assert status == 303
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    cookie = cookie.split(";")[0]
    status, text, _ = ask(guarded, Cookie=cookie)
    assert status == 200
    signed_in = {"csrf": csrf_of(text)}
    assert ask(guarded, form=form | {"name": "x"}, Cookie=cookie)[0] == 403  # the CSRF token of another session
    assert ask(guarded, "/sign-out", form=signed_in, Cookie=cookie)[0] == 303
    assert ask(guarded, Cookie=cookie)[0] == 303


def test_wrong_tokens_are_slowed_down(guarded: WebServer) -> None:
    form = {"csrf": csrf_of(ask(guarded, "/sign-in")[1])}
    assert [ask(guarded, "/sign-in", form=form | {"token": "x"})[0] for _ in range(6)] == [403] * 5 + [429]
    assert ask(guarded, "/sign-in", form=form | {"token": TOKEN})[0] == 429


def test_a_rate_limit_refills() -> None:
    limit = RateLimit(burst=2, seconds=10.0)
    assert [limit.allows("a", now) for now in (0.0, 0.0, 0.0, 9.0, 10.0, 10.0)] == [
        True,
        True,
        False,
        False,
        True,
        False,
    ]
    assert limit.allows("b", 10.0)


def test_a_stream_sends_all_elements_first_and_then_those_that_change(
    site: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    connection.request("GET", "/live")
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    events = []
    while len(events) < 2:
        line = answer.readline().decode()
        if line.startswith("data: "):
            events.append(json.loads(line[6:]))
    site.close()
    assert not caplog.messages  # the stream ends with its server
    connection.close()
    assert [set(event) for event in events] == [{"a", "b"}, {"a"}]


def test_a_stream_that_waits_ends_at_once_with_its_server(site: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    connection.request("GET", "/slow")
    answer = connection.getresponse()
    while not answer.readline().startswith(b"data: "):
        pass
    site.close()
    assert not caplog.messages
    connection.close()


def test_a_stream_ends_with_its_session(guarded: WebServer) -> None:
    form = {"csrf": csrf_of(ask(guarded, "/sign-in")[1])}
    cookie = ask(guarded, "/sign-in", form=form | {"token": TOKEN})[2]["set-cookie"].split(";")[0]
    signed_in = {"csrf": csrf_of(ask(guarded, Cookie=cookie)[1])}
    connection = http.client.HTTPConnection("127.0.0.1", guarded.port, timeout=10)
    connection.request("GET", "/live", headers={"Cookie": cookie})
    answer = connection.getresponse()
    answer.readline()
    assert ask(guarded, "/sign-out", form=signed_in, Cookie=cookie)[0] == 303
    answer.read()  # to its end
    connection.close()


def test_a_form_that_does_not_arrive_is_refused(site: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "FORM_SECONDS", 0.05)
    assert ask(site, form="csrf=", Content_Length="100")[0] == 408


def test_a_connection_without_another_request_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "REQUEST_SECONDS", 0.1)
    with start(tmp_path) as site, socket.create_connection(("127.0.0.1", site.port), timeout=5) as client:
        request = b"GET /static/style.css HTTP/1.1\r\nHost: localhost\r\n"
        client.sendall(request + b"\r\n" + request)  # the second one never ends
        since = time.monotonic()
        while client.recv(1 << 16):
            pass
        assert time.monotonic() - since < 4


def test_a_connection_without_a_request_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "REQUEST_SECONDS", 0.05)
    with start(tmp_path) as site, socket.create_connection(("127.0.0.1", site.port), timeout=5) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        since = time.monotonic()
        assert client.recv(100) == b""
        assert time.monotonic() - since < 4


def test_an_operators_certificate_opens_the_page_and_a_devices_does_not(
    tmp_path: Path, certified: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "TICKS", 1)
    monkeypatch.setattr(serve, "HANDSHAKE_SECONDS", 60.0)
    certified.revoke("former")
    with (
        start(tmp_path, TOKEN, certified.server()) as site,
        socket.create_connection(("127.0.0.1", site.port), timeout=30) as silent,
    ):
        for name in ("nobody", "device", "operator-by-name", "server"):
            context = certified.context(name)
            assert ask(site, context=context)[0] == 303
            assert ask(site, "/live", context=context, Accept="text/event-stream")[0] == 401
        with pytest.raises(OSError):
            ask(site, context=certified.context("former"))
        for name in ("operator", "anna"):
            context = certified.context(name)
            status, text, _ = ask(site, context=context)
            assert (status, "Sign out" in text) == (200, False)
            form = {"name": "by ", "csrf": csrf_of(text)}
            assert ask(site, form=form, context=context)[:2] == (200, f"by {name}")
            assert ask(site, form=form, context=certified.context("device"))[0] == 401
        connection = http.client.HTTPSConnection("localhost", site.port, timeout=30, context=certified.context("anna"))
        connection.request("GET", "/slow")
        answer = connection.getresponse()
        assert answer.status == 200
        certified.revoke("former", "anna")
        with pytest.raises(http.client.IncompleteRead):
            answer.read()  # the revocation ends open connections,
        assert silent.recv(1) == b""  # and handshakes that began before it
        with pytest.raises(OSError):
            ask(site, context=certified.context("anna"))


@pytest.mark.parametrize(("number", "seconds", "ended"), [(4, 60.0, 8), (64, 0.2, 12)], ids=["number", "time"])
def test_handshakes_without_an_end_are_bounded(
    tmp_path: Path, certified: Certified, monkeypatch: pytest.MonkeyPatch, number: int, seconds: float, ended: int
) -> None:
    monkeypatch.setattr(serve, "HANDSHAKES", number)
    monkeypatch.setattr(serve, "HANDSHAKE_SECONDS", seconds)
    certified.revoke("former")
    with start(tmp_path, TOKEN, certified.server()) as site, ExitStack() as opened:
        silent = [
            opened.enter_context(socket.create_connection(("127.0.0.1", site.port), timeout=30)) for _ in range(12)
        ]
        assert [each.recv(1) for each in silent[:ended]] == [b""] * ended
        monkeypatch.setattr(serve, "HANDSHAKE_SECONDS", 60.0)
        assert ask(site, context=certified.context("nobody"))[0] == 303


def test_where_a_page_listens() -> None:
    with pytest.raises(ConfigError, match="needs a token"):
        Access("0.0.0.0", 80, None, encrypted=True)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.MonkeyPatch.context() as patch:
        patch.setattr(listening, "BIND_SECONDS", 0.0)
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"--page: cannot listen on 127.0.0.1:{port}"):
            listen("--page", "127.0.0.1", port)


def test_a_stored_token_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "new" / "token"
    token = stored_token(path)
    assert len(token) >= 32
    assert stored_token(path) == token
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        stored_token(path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ConfigError, match="less than 16"):
        stored_token(path)
    with pytest.raises(ConfigError, match="folder"):
        stored_token(tmp_path)
