"""Broker addresses, and which of them allow unencrypted traffic."""

from __future__ import annotations

import ipaddress
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from fedfmsl.common.settings import without_secrets
from fedfmsl.errors import ConfigError

PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
WEBSOCKET_PATH = "/mqtt"
MAX_HOST = 253  # characters
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_NETLOC = re.compile(r"(\[[0-9A-Za-z.:%_-]+\]|[^:\[\]]+)(:[0-9]*)?")
RESERVED = "/?#[]"  # end the part of a URL that holds user and password
ENCODE = "percent-encode it (# is %23, / is %2F, ? is %3F, @ is %40), or set FEDFMSL_USER and FEDFMSL_PASSWORD instead"


@dataclass(frozen=True)
class Address:
    scheme: str
    host: str
    port: int
    path: str  # of a WebSocket
    user: str = ""
    password: str = field(default="", repr=False)

    @property
    def encrypted(self) -> bool:
        return self.scheme in ("mqtts", "wss")

    @property
    def websocket(self) -> bool:
        return self.scheme in ("ws", "wss")


def parse_address(broker: str) -> Address:
    """Parses an address like mqtts://host and fills in defaults. An address without user and password takes them from
    FEDFMSL_USER and FEDFMSL_PASSWORD: other users can read a command line, but not the environment.

    Raises ConfigError. Its text has no part of the address that may be a password.
    """
    text = f"broker address {without_secrets(broker)!r}"
    scheme, _, rest = broker.partition("://")
    login, _, location = rest.rpartition("@")
    if any(c in RESERVED or c.isspace() for c in login):
        raise ConfigError(f"{text}: its user or password holds a space or one of {RESERVED}; {ENCODE}")
    try:
        parts = urlsplit(f"{scheme}://{location}")
        host, port = parts.hostname, parts.port
    except ValueError:  # its text shows the port, which is a password if the address ends before its @
        host = port = None
    if scheme not in PORTS or not host or port == 0 or not _NETLOC.fullmatch(parts.netloc):
        raise ConfigError(f"{text} is not of the form mqtt://host:port; the other schemes are mqtts, ws and wss")
    if parts.path.strip("/") and scheme not in ("ws", "wss"):
        raise ConfigError(f"{text} has a path, which only addresses of ws and wss have; remove it")
    if not location.isprintable() or not is_host(host):
        raise ConfigError(f"{text} has no valid host name or address; check its dots, spaces and length")
    user, _, password = login.partition(":")
    return Address(
        scheme,
        host,
        port or PORTS[scheme],
        parts.path or WEBSOCKET_PATH,
        unquote(user) or os.environ.get("FEDFMSL_USER", ""),
        unquote(password) or os.environ.get("FEDFMSL_PASSWORD", ""),
    )


def netloc(host: str) -> str:
    """A host name or address in a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def is_host(host: str) -> bool:
    """Whether it is an IP address, or can be the name of a machine. Underscores are common in local networks."""
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    try:
        name = host.encode("idna").decode()
    except UnicodeError:  # a part of the name is empty or too long, or has a character that no name has
        return False
    return len(name) <= MAX_HOST and _HOST.fullmatch(name) is not None


def require_loopback(what: str, host: str, remedy: str) -> None:
    """Raises ConfigError if unencrypted traffic would leave this machine. `remedy` is part of the message."""
    if not is_loopback(host):
        raise ConfigError(f"{what} would travel unencrypted; {remedy}, or allow it with --insecure")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        return False
