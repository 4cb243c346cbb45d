"""Detection of a second server of the same run."""

from __future__ import annotations

import pytest

from fedfmsl.protocol.messages import ServerStatus
from trainer_server.service.duplicates import DuplicateServerGuard


@pytest.fixture
def guard() -> DuplicateServerGuard:
    guard = DuplicateServerGuard("own", echo_seconds=10.0)
    guard.connected(now=0.0)
    return guard


def status(instance: str, online: bool = True) -> ServerStatus:
    return ServerStatus(online=online, run="r", session="1", instance=instance)


def test_a_newer_server_takes_over(guard: DuplicateServerGuard) -> None:
    guard.receive(status("own"))
    assert not guard.superseded
    guard.receive(status("newer"))
    assert guard.superseded


def test_an_earlier_server_does_not_take_over(guard: DuplicateServerGuard) -> None:
    for instance in ("earlier", "own", "earlier"):
        guard.receive(status(instance))
    assert not guard.superseded


def test_an_offline_status_of_a_newer_server_counts_after_a_reconnection(guard: DuplicateServerGuard) -> None:
    guard.receive(status("own"))
    guard.receive(status("newer", online=False))
    assert not guard.superseded
    guard.connected(now=20.0)
    guard.receive(status("newer", online=False))
    assert guard.superseded


def test_a_missing_echo_is_reported_once_per_connection(guard: DuplicateServerGuard) -> None:
    assert [guard.echo_is_missing(now) for now in (10.0, 10.1, 20.0)] == [False, True, False]
    guard.connected(now=30.0)
    assert guard.echo_is_missing(41.0)


def test_no_echo_is_missing_after_the_own_status(guard: DuplicateServerGuard) -> None:
    guard.receive(status("own"))
    assert not guard.echo_is_missing(11.0)
