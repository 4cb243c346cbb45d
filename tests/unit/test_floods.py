"""Which traffic of a device is a flood."""

from __future__ import annotations

import pytest

from fedfmsl.protocol.chunks import CHUNK_BYTES
from trainer_server.service.floods import SPARE_BYTES, SPARE_MESSAGES, UPDATES, WINDOW_SECONDS, FloodGuard

LARGEST = 1_200_000
CHUNKS = 13


@pytest.fixture
def guard() -> FloodGuard:
    return FloodGuard(LARGEST, 2500, set())


def sent(guard: FloodGuard, messages: int, size: int, device: str = "a", now: float = 0.0) -> bool:
    """Whether the messages are a flood."""
    return sum(bool(guard.received(device, size, now)) for _ in range(messages)) > 0


def test_updates_that_count_are_no_flood_at_any_speed(guard: FloodGuard) -> None:
    for _ in range(1000):
        assert not sent(guard, CHUNKS, CHUNK_BYTES)
        guard.counted("a", CHUNKS * CHUNK_BYTES)


def test_chunks_that_never_become_an_update_are_a_flood(guard: FloodGuard) -> None:
    assert not sent(guard, UPDATES * CHUNKS, CHUNK_BYTES)
    assert sent(guard, SPARE_BYTES // CHUNK_BYTES, CHUNK_BYTES)
    assert guard.dropped == {"a"}
    assert not sent(guard, 1, CHUNK_BYTES, "b")


def test_too_many_small_messages_are_a_flood_and_a_minute_later_none(guard: FloodGuard) -> None:
    assert not sent(guard, SPARE_MESSAGES, 10)
    assert not sent(guard, SPARE_MESSAGES, 10, now=WINDOW_SECONDS)
    assert sent(guard, SPARE_MESSAGES, 10, now=WINDOW_SECONDS)


def test_late_updates_of_quick_rounds_are_no_flood(guard: FloodGuard) -> None:
    for _ in range(1000):
        guard.round_opened()
        assert not sent(guard, CHUNKS, CHUNK_BYTES)
