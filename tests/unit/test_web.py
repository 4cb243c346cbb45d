"""The base of all web pages: who may use it, what a browser may load, and that a hostile client does no harm."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from support.web import ask, csrf_of

from fedfmsl.errors import ConfigError, RunError
from fedfmsl.web import gate, serve
from fedfmsl.web.access import Access, RateLimit, stored_token
from fedfmsl.web.application import application, page
from fedfmsl.web.serve import WebServer, listen, parse_listen, server_context
from fedfmsl.web.stream import stream

TOKEN = "a token of enough characters"
HOSTILE = "<script>alert(1)</script>"


async def _show(request: Request) -> Response:
    if request.method == "POST":
        return Response(request.state.form["name"])
    return page(request, "error.html", title="Devices", reason=HOSTILE)


async def _live(request: Request) -> Response:
    return stream(lambda: {"a": f"<p id='a'>{next(COUNT)}</p>", "b": "<p id='b'></p>"}, seconds=0.01)


async def _slow(request: Request) -> Response:
    return stream(lambda: {"a": "<p id='a'></p>"}, seconds=60.0)


COUNT = iter(range(1000))
ROUTES = [Route("/", _show, methods=["GET", "POST"]), Route("/live", _live), Route("/slow", _slow)]


def start(tmp_path: Path, token: str | None = None) -> WebServer:
    listener = listen("--page", "127.0.0.1", 0)
    access = Access("127.0.0.1", listener.getsockname()[1], token, encrypted=False)
    return WebServer(application("Test", ROUTES, access, tmp_path), listener)


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


def test_where_a_page_listens() -> None:
    assert parse_listen("--page", "[::1]:8080") == ("::1", 8080)
    for wrong in ("8080", "127.0.0.1:", "a b:80", "127.0.0.1:99999", "host:-1"):
        with pytest.raises(ConfigError, match=r"--page .*HOST:PORT"):
            parse_listen("--page", wrong)
    with pytest.raises(ConfigError, match=r"--page.* unencrypted .*--identity"):
        server_context("--page", "192.168.1.5", None, insecure=False)
    with pytest.raises(ConfigError, match="needs a token"):
        Access("0.0.0.0", 80, None, encrypted=True)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "BIND_SECONDS", 0.0)
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
