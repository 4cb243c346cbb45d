"""Detects a second server of the same run."""

from __future__ import annotations

import math

from fedfmsl.protocol.messages import ServerStatus

ECHO_SECONDS = 10.0


class DuplicateServerGuard:
    """The newer of two servers takes over (ours).

    The broker orders the retained statuses of a run. A session that appears before this server's own status is
    returned belongs to an earlier server. One that appears later belongs to a newer server.
    """

    def __init__(self, session: str, echo_seconds: float = ECHO_SECONDS) -> None:
        """The broker has `echo_seconds` to return this server's own status."""
        self._session = session
        self._echo_seconds = echo_seconds
        self._earlier: set[str] = set()
        self._echoed = False
        self._connections = 0
        self._echo_due = math.inf
        self.superseded = False

    def connected(self, now: float) -> None:
        self._connections += 1
        self._echo_due = now + self._echo_seconds

    def receive(self, status: ServerStatus) -> None:
        """Sets `superseded` if a newer server has taken over."""
        if status.session == self._session:
            self._echoed = True
        elif not self._echoed:
            self._earlier.add(status.session)
        elif status.session not in self._earlier and (status.online or self._connections > 1):
            # After a reconnection an offline status counts too: both use one client id, so connecting again made the
            # broker disconnect the newer server and publish its last will.
            self.superseded = True

    def echo_is_missing(self, now: float) -> bool:
        """True once per connection, if the broker has not returned this server's own status in time."""
        if now <= self._echo_due:
            return False
        self._echo_due = math.inf
        return not self._echoed
