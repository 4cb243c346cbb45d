"""The HTTP server of a web page: uvicorn in its own thread, with its own event loop.

A fault of a page, or clients that overload it, do not reach the process's other threads. Connections and TLS handshakes
are bounded, and one that sends no complete request in time is closed. Connections are accepted here, because uvicorn
waits for any number of handshakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedfmsl.transport.address import is_loopback, netloc
from fedfmsl.transport.identity import operator_of
from fedfmsl.transport.listening import openable
from fedfmsl.transport.server_contexts import ServerContexts, revocation_list_beside

logger = logging.getLogger(__name__)

CONNECTIONS = 64
HANDSHAKES = 64  # at a time; one more ends the oldest
HANDSHAKE_SECONDS = 10.0
REQUEST_SECONDS = 10.0  # for a request of a connection, and at most twice that between two
HEAD_BYTES = 1 << 14
CLOSE_SECONDS = 3  # for open streams, when the page ends
ABORT_SECONDS = 2  # then connections are cut
PAUSE_SECONDS = 0.1  # until a connection is accepted again after no descriptor was free
TICKS = 10  # of uvicorn, a second
Context = Callable[[], ssl.SSLContext]  # for new connections


class _Protocol(H11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._earlier: object = None  # the latest request when it was last checked
        self._check = self.loop.call_later(REQUEST_SECONDS, self._end_without_request)
        connection = transport.get_extra_info("ssl_object")
        certificate = connection.getpeercert(binary_form=True) if connection else None
        self.app = _of_operator(self.app, operator_of(certificate) if certificate else "")
        if len(self.connections) > 2 * CONNECTIONS:  # requests of more than CONNECTIONS are refused with an answer
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._check.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """A client that does not answer the end of its TLS connection does not delay the end of the server."""
        super().shutdown()
        self.loop.call_later(ABORT_SECONDS, self.transport.abort)

    def _end_without_request(self) -> None:
        """Ends a connection that has begun no request since the last check, and waits for no answer."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.cycle is self._earlier:
            self.transport.close()
        else:
            self._earlier = self.cycle
            self._check = self.loop.call_later(REQUEST_SECONDS, self._end_without_request)


def _of_operator(app: ASGIApp, operator: str) -> Any:
    """The application, for requests of one connection. `operator`: whose certificate its client has shown, or ""."""

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "operator": operator}, receive, send)

    return called


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, listeners: Sequence[socket.socket], current: Context | None) -> None:
        super().__init__(config)
        self._listeners, self._current = listeners, current
        self._context = current() if current else None
        self._accepting: list[asyncio.Task[None]] = []
        self._connecting: list[asyncio.Task[None]] = []  # the oldest first

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._accepting = [asyncio.create_task(self._accept(listener)) for listener in self._listeners]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in (*self._accepting, *self._connecting):
            task.cancel()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """After a change of certificates all connections and handshakes end, also those of revoked operators. Browsers
        connect again."""
        if self._current and counter % TICKS == 0 and self._current() is not self._context:
            self._context = self._current()
            for task in self._connecting:
                task.cancel()
            for connection in list(self.server_state.connections):
                connection.transport.close()
        return await super().on_tick(counter)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError:  # the client is gone, or no descriptor is free
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            if len(self._connecting) >= HANDSHAKES:
                self._connecting.pop(0).cancel()
            task = asyncio.create_task(self._connect(accepted))
            self._connecting.append(task)
            task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[None]) -> None:
        with contextlib.suppress(ValueError):
            self._connecting.remove(task)

    async def _connect(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        context = self._current() if self._current else None
        seconds = HANDSHAKE_SECONDS if context else None
        with contextlib.suppress(OSError):  # the handshake has failed, or takes too long
            await loop.connect_accepted_socket(self._protocol, accepted, ssl=context, ssl_handshake_timeout=seconds)

    def _protocol(self) -> asyncio.Protocol:
        return _Protocol(self.config, self.server_state, self.lifespan.state)


class WebServer:
    """Serves `app` on `listeners` until `close`."""

    def __init__(self, app: Starlette, listeners: Sequence[socket.socket], context: Context | None = None) -> None:
        """`context`: for TLS."""
        host, port = listeners[0].getsockname()[:2]
        self.port: int = port
        self.url = f"{'https' if context else 'http'}://{netloc(openable(host))}:{port}/"
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
        self._app, self._server = app, _Server(config, listeners, context)
        self._listeners = listeners
        self._thread = threading.Thread(target=self._server.run, name="web", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._app.state.closing.set()  # streams end
        self._server.should_exit = True
        self._thread.join(2 * CLOSE_SECONDS)
        for listener in self._listeners:
            listener.close()

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def page_context(
    host: str, identity: Path | None, revoked: Path | None = None, clients: ssl.VerifyMode = ssl.CERT_NONE
) -> Context | None:
    """For a page that listens on `host`; None for a page without TLS: on a loopback address, or without `identity`.
    `clients` and `revoked`, by default the list beside `identity`, as `ServerContexts`. Raises ConfigError."""
    if is_loopback(host) or identity is None:
        return None
    if clients is not ssl.CERT_NONE:
        revoked = revoked or revocation_list_beside(identity)
        if revoked is None:
            logger.warning("no revocation list, so the certificates of revoked operators open the page; give --revoked")
    return ServerContexts(identity, revoked, logger.warning, clients).current
