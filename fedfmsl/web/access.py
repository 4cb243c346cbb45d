"""Who may use a web page: host names, token, sessions, CSRF tokens and rate limits.

A page on a loopback address is open to the users of this machine. Every other page needs a token, or the certificate of
an operator (`fedfmsl.transport.identity.operator_of`) where the server asks for one. Names in the Host header are
checked, so that a page of another site cannot reach this one under its own name (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from fedfmsl.errors import ConfigError
from fedfmsl.transport.address import is_loopback

SESSION_SECONDS = 12 * 3600.0
SESSIONS = 64
ADDRESSES = 1024  # whose requests are counted
ANONYMOUS = "anonymous"  # the session of a page without a token


@dataclass
class RateLimit:
    """A token bucket for each address: `burst` at once, and one more every `seconds`."""

    burst: int
    seconds: float
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)  # allowance, and when

    def allows(self, address: str, now: float, cost: float = 1.0) -> bool:
        """Whether the address may do it now, which costs `cost` of its allowance. `cost` 0 only asks."""
        allowance, at = self._buckets.pop(address, (float(self.burst), now))
        allowance = min(allowance + (now - at) / self.seconds, float(self.burst))
        is_allowed = allowance >= max(cost, 1.0)
        self._buckets[address] = (allowance - cost if is_allowed else allowance, now)
        while len(self._buckets) > ADDRESSES:
            self._buckets.popitem(last=False)
        return is_allowed


class Access:
    """The access rules of one web page, and its sessions. Used from one thread."""

    def __init__(self, host: str, port: int, token: str | None, encrypted: bool) -> None:
        """`host` and `port`: where it listens. `token`: None if the page is open to the users of this machine. Raises
        ConfigError if other machines could use the page without a token."""
        if token is None and not is_loopback(host):
            raise ConfigError(f"{host} can be reached from other machines, so the page needs a token")
        self.encrypted = encrypted
        self.cookie = f"fedfmsl_{port}"  # browsers send the cookies of one port to all others
        self._host = host
        self._token = token
        self._key = secrets.token_bytes(32)
        self._sessions: OrderedDict[str, float] = OrderedDict()  # until when each is valid
        self.requests = RateLimit(burst=200, seconds=0.05)
        self.failures = RateLimit(burst=5, seconds=12.0)

    def is_host(self, header: str) -> bool:
        """Whether a Host header names this machine: by an address, localhost, its own name, or the name it listens
        on."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            own = socket.gethostname().lower()
            return name in {"localhost", own, f"{own.split('.')[0]}.local", self._host.lower()}
        return address.is_loopback or not is_loopback(self._host)

    def is_same_origin(self, origin: str | None, host: str) -> bool:
        """Whether a request comes from a page of this site, by its Origin header. A request without one has no page, or
        is a browser's from the same site."""
        return origin is None or origin == f"{'https' if self.encrypted else 'http'}://{host}"

    def sign_in(self, token: str) -> str | None:
        """A new session, if the token is right."""
        expected = hashlib.sha256((self._token or "").encode()).digest()
        if not hmac.compare_digest(hashlib.sha256(token.strip().encode()).digest(), expected):
            return None
        session = secrets.token_urlsafe(32)
        self._sessions[session] = time.monotonic() + SESSION_SECONDS
        while len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)
        return session

    def sign_out(self, session: str) -> None:
        self._sessions.pop(session, None)

    def session(self, cookie: str | None, operator: str = "") -> str | None:
        """The session of a request; None if it has to sign in. `operator`: whose certificate its connection has."""
        if self._token is None:
            return ANONYMOUS
        if self.is_signed_in(cookie):
            return cookie
        return f"certificate of {operator}" if operator else None

    def is_signed_in(self, cookie: str | None) -> bool:
        """Whether it is the cookie of a session that began with the token."""
        until = self._sessions.get(cookie or "")
        return until is not None and time.monotonic() < until

    def csrf(self, session: str | None) -> str:
        """What a form of this session carries. Other sites cannot read it."""
        return hmac.new(self._key, (session or ANONYMOUS).encode(), "sha256").hexdigest()

    def is_csrf(self, session: str | None, token: str) -> bool:
        return hmac.compare_digest(self.csrf(session).encode(), token.encode())
