"""What a service manager hears, on a socket as systemd's."""

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
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("\0" + name if abstract else name)
        heard.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        yield heard


def words(manager: socket.socket) -> list[str]:
    """All that has been said by now: a datagram is there as soon as it was sent."""
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


def test_a_manager_hears_each_state(manager: socket.socket) -> None:
    notify("READY=1")
    notify("STATUS=81.5 °C, above --max-temperature 75")
    assert words(manager) == ["READY=1", "STATUS=81.5 °C, above --max-temperature 75"]


def test_the_watchdog_is_fed_twice_as_often_as_it_must_be(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    now = 1000.0
    monkeypatch.setattr("fedfmsl.common.systemd.time.monotonic", lambda: now)
    watchdog = Watchdog()
    fed = []
    for now in (1000.0, 1001.0, 1029.9, 1030.0, 1059.0, 1061.0):  # noqa: B007 - it is the clock
        watchdog()
        fed.append(len(words(manager)))
    assert fed == [1, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("process", [None, 1])
def test_who_is_not_watched_feeds_nobody(
    process: int | None, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    if process:  # a child inherits what was meant for its parent
        monkeypatch.setenv("WATCHDOG_PID", str(process))
        monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    Watchdog()()
    assert words(manager) == []


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")
