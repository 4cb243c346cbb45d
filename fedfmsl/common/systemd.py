"""What systemd is told of a service with Type=notify, in the words of sd_notify(3). Elsewhere nothing happens."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(state: str) -> None:
    """`state` is READY=1, STOPPING=1, STATUS=… and the like, one a line."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if where:
        address = "\0" + where[1:] if where.startswith("@") else where  # an abstract one
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), address)


class Watchdog:
    """Tells systemd that this process is alive, as often as it wants to know. To be called more often than that."""

    def __init__(self) -> None:
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._seconds = int(os.environ.get("WATCHDOG_USEC", 0)) / 2e6 if ours else 0.0
        self._due = 0.0

    def __call__(self) -> None:
        if self._seconds and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._seconds
            notify("WATCHDOG=1")
