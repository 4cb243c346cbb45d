"""Where a process listens: HOST:PORT, and the sockets there."""

from __future__ import annotations

import errno
import re
import socket
import time

from fedfmsl.errors import ConfigError, RunError
from fedfmsl.transport.address import is_host, netloc

BACKLOG = 128  # connections that wait to be accepted
ANY = ("0.0.0.0", "::")  # hosts that mean all addresses of this machine
BIND_SECONDS = 3.0  # for the port of a process that was killed to become free
_ADDRESS = re.compile(r"(\[[0-9A-Za-z.:%_-]+\]|[^:\[\]]+):([0-9]{1,5})", re.ASCII)


def parse_listen(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises ConfigError."""
    found = _ADDRESS.fullmatch(address)
    host, port = (found[1].strip("[]"), int(found[2])) if found else ("", 0)
    if not 0 < port < 2**16 or not is_host(host):
        raise ConfigError(f"{address!r} is not HOST:PORT; write it like 127.0.0.1:9000 or [::1]:9000")
    return host, port


def parse_reachable(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT as other machines reach it. Raises ConfigError."""
    host, port = parse_listen(address)
    if host in ANY:
        raise ConfigError(f"{address!r}: devices cannot reach {host}; give a name or an address of this machine")
    return host, port


def openable(host: str) -> str:
    """A host that a browser on another machine can open: for all addresses of this machine, its name."""
    return socket.gethostname() if host in ANY else host


def listen(flag: str, host: str, port: int, anywhere: bool = False) -> list[socket.socket]:
    """Sockets that listen on every address of `host`, and do not block. `anywhere`: on all addresses of this machine if
    it has none of `host`, as in a container or behind address translation. Waits up to BIND_SECONDS for the port.

    Raises RunError, which names `flag`, if it cannot listen there.
    """
    deadline = time.monotonic() + BIND_SECONDS
    while True:
        try:
            return _listeners(host, port, anywhere)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise cannot_listen(flag, host, port, error) from error
        time.sleep(0.1)


def cannot_listen(flag: str, host: str, port: int, error: OSError) -> RunError:
    """The error of a process that cannot listen there, with its reason."""
    why = why_not_listening(host, error)
    return RunError(f"{flag}: cannot listen on {netloc(host)}:{port} ({why}); choose another address")


def why_not_listening(host: str, error: OSError) -> str:
    """Why a process cannot listen on an address of `host`."""
    if isinstance(error, socket.gaierror):
        return f"{host} is no name or address that this machine knows, {error.strerror}"
    return "the port is in use" if error.errno == errno.EADDRINUSE else str(error.strerror or error)


def _listeners(host: str | None, port: int, anywhere: bool) -> list[socket.socket]:
    """Raises OSError."""
    listeners: list[socket.socket] = []
    missing = OSError(errno.EADDRNOTAVAIL, "this machine has no such address")
    try:
        for family, _, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
            else:
                listener.setblocking(False)
                listeners.append(listener)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    if not listeners and host is not None and anywhere:
        return _listeners(None, port, anywhere)
    if not listeners:
        raise missing
    return listeners
