"""Notifications to systemd from a service with Type=notify (see sd_notify(3)). Without systemd they do nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable


def notify(state: str) -> None:
    """`state`: assignments like READY=1, STOPPING=1, STATUS=…, one per line."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        address = "\0" + path[1:] if path.startswith("@") else path  # "@" stands for an abstract socket
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), address)


class Watchdog:
    """Notifies systemd that this process is alive, twice per watchdog interval. Call it more often than that."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        addressed = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._seconds = int(os.environ.get("WATCHDOG_USEC", 0)) / 2e6 if addressed else 0.0
        self._clock = clock
        self._due = 0.0

    def __call__(self) -> None:
        if self._seconds and self._clock() >= self._due:
            self._due = self._clock() + self._seconds
            notify("WATCHDOG=1")
