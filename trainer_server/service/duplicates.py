"""Detects a second server of the same run."""

from __future__ import annotations

import math

from fedfmsl.protocol.duplicate_name import DuplicateNameGuard
from fedfmsl.protocol.messages import ServerStatus

ECHO_SECONDS = 10.0


class DuplicateServerGuard:
    """The newer of two servers takes over the run."""

    def __init__(self, instance: str, echo_seconds: float = ECHO_SECONDS) -> None:
        """The broker has `echo_seconds` to return this server's own status."""
        self._guard = DuplicateNameGuard(instance)
        self._echo_seconds = echo_seconds
        self._echo_due = math.inf
        self._connections = 0
        self.superseded = False

    def connected(self, now: float) -> None:
        self._connections += 1
        self._echo_due = now + self._echo_seconds

    def receive(self, status: ServerStatus) -> None:
        """Sets `superseded` if a newer server has taken over.

        After a reconnection an offline status counts as well: where the broker allows one connection per identity,
        this server's connection has ended the newer one's, and the status is its last will.
        """
        if self._guard.is_newer(status.instance) and (status.online or self._connections > 1):
            self.superseded = True
        self._guard = self._guard.observe(status.instance)

    def echo_is_missing(self, now: float) -> bool:
        """True once per connection, if the broker has not returned this server's own status in time."""
        if now <= self._echo_due:
            return False
        self._echo_due = math.inf
        return not self._guard.confirmed
