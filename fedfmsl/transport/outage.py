"""Logs why there is no connection, and keeps it for a status.

A broker that restarts gives several reasons one after the other, and repeats them at every attempt. Each is logged once
until the connection is back.
"""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)


class Outage:
    """`since`: unix seconds. `reason`: the latest one. `rejected`: the broker refuses this machine's certificate. They
    are empty while there is a connection. `count`: of outages so far."""

    def __init__(self) -> None:
        self.count = 0
        self.since = 0.0
        self.reason = ""
        self.rejected = False
        self._logged: set[str] = set()

    def lost(self, reason: str, rejected: bool = False) -> None:
        self.count += not self.since
        self.since = self.since or time.time()
        self.reason, self.rejected = reason, rejected
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning(f"no connection to the broker ({reason}); reconnecting")

    def ended(self) -> None:
        if self.since:
            logger.info("connected to the broker again")
        self.since, self.reason, self.rejected = 0.0, "", False
        self._logged.clear()
