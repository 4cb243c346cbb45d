"""Notifications on a socket like systemd's."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedfmsl.common.systemd import Watchdog, notify


@pytest.fixture(params=["a file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify")
    abstract = request.param == "abstract"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name if abstract else name)
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        yield listener


def received(manager: socket.socket) -> list[str]:
    """All datagrams so far. A datagram is there as soon as it is sent."""
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


def test_each_state_is_sent(manager: socket.socket) -> None:
    notify("READY=1")
    notify("STATUS=81.5 °C, above --max-temperature 75")
    assert received(manager) == ["READY=1", "STATUS=81.5 °C, above --max-temperature 75"]


def test_the_watchdog_is_notified_twice_per_interval(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    now = 1000.0
    watchdog = Watchdog(clock=lambda: now)
    sent = []
    for now in (1000.0, 1001.0, 1029.9, 1030.0, 1059.0, 1061.0):  # noqa: B007 - read by the clock
        watchdog()
        sent.append(len(received(manager)))
    assert sent == [1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("process", [None, 1])
def test_a_process_without_a_watchdog_sends_nothing(
    process: int | None, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    if process:  # a child inherits its parent's environment
        monkeypatch.setenv("WATCHDOG_PID", str(process))
        monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    Watchdog()()
    assert received(manager) == []


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")
