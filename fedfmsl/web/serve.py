"""The HTTP server of a web page: uvicorn in its own thread, with its own event loop.

A fault of a page, or clients that overload it, do not reach the process's other threads. Connections are bounded, and
one that sends no complete request in time is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedfmsl.errors import ConfigError, RunError
from fedfmsl.transport.address import is_host, is_loopback, netloc, why_not_listening
from fedfmsl.transport.identity import read_identity

CONNECTIONS = 64
REQUEST_SECONDS = 10.0  # for a request of a connection, and at most twice that between two
HEAD_BYTES = 1 << 14
CLOSE_SECONDS = 3  # for open streams, when the page ends
BIND_SECONDS = 3.0  # for the port of a process that was killed to become free


class _Protocol(H11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._earlier: object = None  # the latest request when it was last checked
        self._check = self.loop.call_later(REQUEST_SECONDS, self._end_without_request)
        if len(self.connections) > 2 * CONNECTIONS:  # requests of more than CONNECTIONS are refused with an answer
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._check.cancel()
        super().connection_lost(exc)

    def _end_without_request(self) -> None:
        """Ends a connection that has begun no request since the last check, and waits for no answer."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is self._earlier:
            self.transport.close()
        else:
            self._earlier = self.cycle
            self._check = self.loop.call_later(REQUEST_SECONDS, self._end_without_request)


class WebServer:
    """Serves `app` on a socket of `listen` until `close`."""

    def __init__(self, app: Starlette, listener: socket.socket, context: ssl.SSLContext | None = None) -> None:
        """`context`: for TLS."""
        host, port = listener.getsockname()[:2]
        self.port: int = port
        self.url = f"{'https' if context else 'http'}://{netloc(host)}:{port}/"
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        config.load()
        config.ssl = context
        self._app, self._server = app, uvicorn.Server(config)
        self._listener = listener
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="web", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._app.state.closing.set()  # streams end
        self._server.should_exit = True
        self._thread.join(2 * CLOSE_SECONDS)
        self._listener.close()

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def parse_listen(flag: str, address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, which the setting `flag` has. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 2**16
    if not is_port or not host or not is_host(host.strip("[]")):
        raise ConfigError(f"{flag} {address!r} is not HOST:PORT; write it like 127.0.0.1:8080 or [::1]:8080")
    return host.strip("[]"), int(port)


def server_context(flag: str, host: str, identity: Path | None, insecure: bool) -> ssl.SSLContext | None:
    """The TLS context of a page that listens on `host`; None for a page without TLS: on a loopback address, or with
    `insecure`. It asks for no client certificate. Raises ConfigError if the page needs an identity that is not there.
    """
    if is_loopback(host) or (identity is None and insecure):
        return None
    if identity is None:
        raise ConfigError(
            f"{flag}: the page would travel unencrypted to other machines; pass --identity, let it listen on "
            "127.0.0.1, or allow it with --insecure"
        )
    context = read_identity(identity).server_context()
    context.verify_mode = ssl.CERT_NONE  # the certificate of a device opens nothing
    return context


def listen(flag: str, host: str, port: int) -> socket.socket:
    """A listening socket. Waits up to BIND_SECONDS for the port. Raises RunError if it cannot listen there."""
    deadline = time.monotonic() + BIND_SECONDS
    while True:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            listener = socket.create_server((host, port), family=family, backlog=CONNECTIONS)
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                why = why_not_listening(host, error)
                raise RunError(
                    f"{flag}: cannot listen on {netloc(host)}:{port} ({why}); choose another address"
                ) from error
            time.sleep(0.1)
        else:
            with contextlib.suppress(OSError):
                listener.setblocking(False)
            return listener
