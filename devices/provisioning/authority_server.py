"""Answers requests for certificates over HTTPS: `devices.provision serve`.

    GET  /ca      the CA's certificate, which a device compares with the fingerprint in its token
    POST /sign    a request in PEM; the answer is the device's file without its key, or a line that says why not

The server's own certificate and key are renewed every month, and only in memory but for a moment: OpenSSL reads files.
"""

from __future__ import annotations

import asyncio
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from devices.provisioning.authority import SERVER
from devices.provisioning.enrollment import Enrollment
from devices.provisioning.fleet import Fleet
from fedfmsl.errors import ConfigError, one_line
from fedfmsl.transport.authority_client import AUTHORITY, SIGN
from fedfmsl.transport.enrollment import MAX_REQUEST_BYTES
from fedfmsl.transport.listening import listen, parse_reachable
from fedfmsl.web.access import RateLimit
from fedfmsl.web.serve import WebServer

FLAG = "ADDRESS"  # of the command
NAME = "authority"  # in the server's certificate
RENEWAL_DAYS = 30
DAY = 86400.0  # seconds
BODY_SECONDS = 10.0  # for a request to arrive
BURST, SECONDS = 20, 3.0  # requests of one address at once, and until it may send one more

Report = Callable[[str], None]


def serve(enrollment: Enrollment, address: str, report: Report) -> WebServer:
    """`address`: HOST:PORT as devices reach it. `report` receives a line for each request. Raises ConfigError for an
    invalid address, RunError if it cannot listen there."""
    host, port = parse_reachable(address)
    contexts = Contexts(enrollment.fleet, host, report)
    contexts.current()
    return WebServer(application(enrollment, report), listen(FLAG, host, port), contexts.current)


@dataclass
class Contexts:
    fleet: Fleet
    host: str
    report: Report
    _context: ssl.SSLContext | None = None
    _due: float = 0.0  # when its certificate is renewed

    def current(self) -> ssl.SSLContext:
        """The TLS context for new connections. If its certificate cannot be renewed, the earlier one."""
        if self._context is None or time.time() > self._due:
            try:
                self._context, self._due = _server_context(self.fleet, self.host), time.time() + RENEWAL_DAYS * DAY
            except (ConfigError, OSError) as error:
                if self._context is None:
                    raise
                self._due = time.time() + DAY
                self.report(f"the certificate of this server is not renewed: {one_line(error)}; trying again in a day")
        return self._context


def _server_context(fleet: Fleet, host: str) -> ssl.SSLContext:
    """Raises ConfigError, or OSError if the temporary file cannot be written."""
    try:
        issued = fleet.authority().issue(NAME, [SERVER], [host], 2 * RENEWAL_DAYS)
    except ValueError as error:
        raise ConfigError(f"{FLAG} {host}: {error}; pass a host's name or address") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:  # readable by its owner only
        file.write(issued.key_pem + issued.certificate_pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def application(enrollment: Enrollment, report: Report) -> Starlette:
    certificate = (enrollment.fleet.folder / "ca.crt").read_text("utf-8")
    limit = RateLimit(BURST, SECONDS)

    async def authority(request: Request) -> Response:
        return PlainTextResponse(certificate)

    async def sign(request: Request) -> Response:
        client = request.client.host if request.client else ""
        if not limit.allows(client, time.monotonic()):
            return PlainTextResponse("too many requests; try again in a minute\n", 429)
        try:
            body = await asyncio.wait_for(_body(request), BODY_SECONDS)
        except (ClientDisconnect, asyncio.TimeoutError):
            return PlainTextResponse("the request has not arrived in time\n", 408)
        if body is None:
            return PlainTextResponse("this is too long for a request\n", 413)
        try:
            name, answer = await run_in_threadpool(enrollment.answer, body)
        except ConfigError as error:
            report(f"{client}: refused: {error}")
            return PlainTextResponse(f"{error}\n", 403)
        report(f"{client}: {name} has a certificate")
        return PlainTextResponse(answer)

    app = Starlette(routes=[Route(AUTHORITY, authority), Route(SIGN, sign, methods=["POST"])])
    app.state.closing = threading.Event()
    return app


async def _body(request: Request) -> bytes | None:
    """None if it is too long."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_REQUEST_BYTES:
            return None
    return bytes(body)
