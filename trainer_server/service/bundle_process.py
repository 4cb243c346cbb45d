"""The process that serves the bundle: python -m trainer_server.service.bundle_process, started by `bundle_http`.

It has its own file descriptors, so that connections of others cannot take the coordinator's. It is a process as
`child_process` describes, and writes at most one line a minute about connections that it has ended.

A connection of more than WAITING without a request ends the oldest of them. Clients are told apart by the names in
their certificates, so there are no limits per client without TLS.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from fedfmsl.errors import FedFMSLError
from fedfmsl.transport.listening import listen
from fedfmsl.transport.server_contexts import ServerContexts
from trainer_server.service.bundle_files import HEAD_BYTES, Response, Served, read_request, refusal, respond
from trainer_server.service.child_process import LISTENING

WAITING = 128  # connections without a request
REFUSAL_SECONDS = 3.0  # for the client to read why its certificate is refused
REQUEST_BYTES = 1 << 16  # that a request costs at least
REPORT_SECONDS = 60.0
REVOKED = 23  # OpenSSL's X509_V_ERR_CERT_REVOKED
NICE = 5  # handshakes take processor time, and the coordinator comes first


@dataclass(frozen=True)
class Limits:
    """`transfers` at a time, `per_client` of one client: with WAITING they fit into 1,024 descriptors. Seconds:
    `answer` for the handshake, then for the request; `block` for each block of a file, so that a client takes at least
    2 KB/s. A client may fetch `bundles` at once, and one more every `bundle_seconds`."""

    transfers: int = 256
    per_client: int = 4
    answer: float = 10.0
    block: float = 30.0
    bundles: int = 4
    bundle_seconds: float = 600.0


@dataclass(frozen=True)
class Job:
    """`files`: path and SHA-256 by name. Without `identity` it serves plain HTTP. `revoked`: the revocation list.
    `allowed`: names of clients; None: all."""

    host: str
    port: int
    files: Mapping[str, Sequence[str]]
    identity: str | None = None
    revoked: str | None = None
    allowed: Sequence[str] | None = None


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    address: str
    deadline: float
    requested: bool = False


@dataclass
class _Client:
    """What a client may still fetch, and its present transfers."""

    allowance: float
    at: float
    transfers: int = 0


class Server:
    def __init__(
        self,
        files: Mapping[str, Served],
        contexts: ServerContexts | None,
        listeners: Sequence[socket.socket],
        allowed: Sequence[str] | None = None,
        limits: Limits = Limits(),
    ) -> None:
        self._allowed = allowed
        self._limits = limits
        self._files = files
        self._contexts = contexts
        self._listeners = listeners
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []  # the oldest first
        self._clients: dict[str, _Client] = {}
        self._transfers = 0
        self._bundle = sum(served.path.stat().st_size for served in files.values() if served.path.is_file())
        self.ended: Counter[str] = Counter()  # connections since the last report, by reason
        self._last, self._reported = "", time.monotonic()

    def serve(self, until: int) -> None:
        """Returns when the descriptor `until` is readable."""
        while True:
            ready = select.select([*(each.fileno() for each in self._listeners), until], [], [], 1.0)[0]
            if until in ready:
                return
            self._end_overdue()
            for listener in self._listeners:
                if listener.fileno() in ready:
                    self._accept(listener)
            self._report()

    def _accept(self, listener: socket.socket) -> None:
        try:
            accepted, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._end_oldest()
                time.sleep(0.01)
            return
        accepted.setblocking(True)
        if self._contexts is not None:
            try:
                context = self._contexts.current()
                accepted = context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
            except OSError:  # the client is gone
                accepted.close()
                return
        connection = _Connection(accepted, address[0], time.monotonic() + self._limits.answer)
        with self._lock:
            self._connections.append(connection)
            waiting = sum(not each.requested for each in self._connections)
        if waiting > WAITING:
            self._end_oldest()
        try:
            threading.Thread(target=self._handle, args=(connection,), daemon=True).start()
        except RuntimeError:  # the system gives this process no more threads
            self._count("no more threads", connection)
            self._end(connection)
            connection.socket.close()

    def _handle(self, connection: _Connection) -> None:
        try:
            name = self._name(connection)
            request = read_request(connection.socket.recv)
            connection.requested = True
            with self._transfer(name) as refused:
                self._send(connection, name, refused or respond(request, self._files))
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            is_revoked = getattr(error, "verify_code", 0) == REVOKED
            self._count("revoked certificate" if is_revoked else "no valid request", connection)
            if isinstance(error, ssl.SSLCertVerificationError):
                self._drain(connection)
        finally:
            with self._lock:
                if connection in self._connections:
                    self._connections.remove(connection)
            connection.socket.close()

    def _name(self, connection: _Connection) -> str:
        """The client's name after the handshake; "" without TLS."""
        if not isinstance(connection.socket, ssl.SSLSocket):
            return ""
        connection.socket.do_handshake()
        connection.deadline = time.monotonic() + self._limits.answer
        subject = (connection.socket.getpeercert() or {}).get("subject", ())
        return str(dict(pair for group in subject for pair in group).get("commonName", ""))  # type: ignore[misc]

    @contextlib.contextmanager
    def _transfer(self, name: str) -> Iterator[Response | None]:
        """Counts a transfer. Yields a refusal if the client or all of them have too many."""
        with self._lock:
            client = self._clients.setdefault(name, _Client(self._limits.bundles * self._unit, time.monotonic()))
            now = time.monotonic()
            earned = self._unit * (now - client.at) / self._limits.bundle_seconds
            client.allowance, client.at = min(client.allowance + earned, self._limits.bundles * self._unit), now
            refused = None
            if self._allowed is not None and name not in self._allowed:
                refused = refusal(HTTPStatus.FORBIDDEN)
            elif name and (client.transfers >= self._limits.per_client or client.allowance <= 0):
                refused = refusal(HTTPStatus.TOO_MANY_REQUESTS)
            elif self._transfers >= self._limits.transfers:
                refused = refusal(HTTPStatus.SERVICE_UNAVAILABLE)
            client.transfers += 1
            self._transfers += 1
        try:
            yield refused
        finally:
            with self._lock:
                client.transfers -= 1
                self._transfers -= 1

    @property
    def _unit(self) -> int:
        return self._bundle + len(self._files) * REQUEST_BYTES

    def _send(self, connection: _Connection, name: str, response: Response) -> None:
        self._clients[name].allowance -= REQUEST_BYTES
        for block in response.blocks():
            connection.deadline = time.monotonic() + self._limits.block
            connection.socket.sendall(block)
            self._clients[name].allowance -= len(block)

    @staticmethod
    def _drain(connection: _Connection) -> None:
        """Reads what the client sends until it has read why it is refused. If the connection was closed before, the
        client could not send its request, and would not read the reason."""
        connection.deadline = min(connection.deadline, time.monotonic() + REFUSAL_SECONDS)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection.socket, socket.SHUT_WR)
            while socket.socket.recv(connection.socket, HEAD_BYTES):
                pass

    def _end_overdue(self) -> None:
        now = time.monotonic()
        with self._lock:
            overdue = [each for each in self._connections if each.deadline < now]
        for connection in overdue:
            self._end(connection)

    def _end_oldest(self) -> None:
        with self._lock:
            oldest = next((each for each in self._connections if not each.requested), None)
        if oldest is not None:
            self._end(oldest)

    def _end(self, connection: _Connection) -> None:
        """Makes its thread end. `SSLSocket.shutdown` would also take away the thread's TLS object."""
        with self._lock:
            if connection in self._connections:
                self._connections.remove(connection)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)

    def _count(self, reason: str, connection: _Connection) -> None:
        with self._lock:
            self.ended[reason] += 1
            self._last = connection.address

    def _report(self) -> None:
        if self.ended and time.monotonic() >= self._reported + REPORT_SECONDS:
            with self._lock:
                counts = ", ".join(f"{reason} {count}×" for reason, count in self.ended.items())
                self.ended.clear()
            self._reported = time.monotonic()
            _say(f"the bundle's server ended connections: {counts}; the last one of {self._last}")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the coordinator has ended
        print(line, flush=True)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # for the coordinator, whose end closes standard input
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    job = Job(**json.loads(sys.stdin.readline()))
    files = {name: Served(Path(path), sha256) for name, (path, sha256) in job.files.items()}
    try:
        contexts = None
        if job.identity:
            contexts = ServerContexts(Path(job.identity), Path(job.revoked) if job.revoked else None, _say)
        listeners = listen("--serve", job.host, job.port, anywhere=True)
    except FedFMSLError as error:
        _say(str(error))
        return 1
    _say(LISTENING)
    Server(files, contexts, listeners, job.allowed).serve(until=sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
