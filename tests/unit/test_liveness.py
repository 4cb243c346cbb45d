"""Which devices the server counts as alive."""

from __future__ import annotations

import pytest

from fedfmsl.protocol.messages import DeviceStatus
from trainer_server.coordinator.events import StatusSeen
from trainer_server.service.liveness import BUSY_SECONDS, SILENT, Liveness

HERE = DeviceStatus(device="d", online=True, instance="1")
GONE = HERE.model_copy(update={"online": False})
LOST = HERE.model_copy(update={"online": False, "error": SILENT})
SILENCE, ANSWER = 200.0, 90.0


@pytest.fixture
def liveness() -> Liveness:
    return Liveness(3, SILENCE, ANSWER)


def lost_at(liveness: Liveness, start: float) -> float:
    """When an online device is lost, if it stays silent from `start` on."""
    now = start
    while not (lost := liveness.lost([HERE], now)):
        now += 1
    assert lost == [StatusSeen(LOST)]
    return now


def test_a_retained_status_is_no_sign_of_life_until_a_live_message_comes(liveness: Liveness) -> None:
    assert liveness.status(HERE, retained=True, now=0) is None
    assert liveness.message("d", online=False, now=1) == StatusSeen(HERE)
    assert liveness.status(HERE, retained=False, now=2) == StatusSeen(HERE)
    assert liveness.status(GONE, retained=True, now=3) == StatusSeen(GONE)
    assert liveness.message("d", online=False, now=4) is None  # its last message was overtaken by its last will
    assert liveness.message("unknown", online=False, now=4) is None


def test_a_device_without_heartbeats_is_lost_and_comes_back_with_one(liveness: Liveness) -> None:
    liveness.status(HERE, retained=False, now=0)
    liveness.message("d", online=True, now=60)
    assert lost_at(liveness, 60) == 60 + SILENCE
    assert liveness.message("d", online=False, now=265) == StatusSeen(HERE)
    assert lost_at(liveness, 265) == 265 + SILENCE


def test_names_that_are_gone_make_space_for_others(liveness: Liveness) -> None:
    names = [HERE.model_copy(update={"device": f"d{number}"}) for number in range(9)]
    for number, status in enumerate(names):
        liveness.status(status, retained=False, now=number * SILENCE / 2)
    assert liveness.message("d8", online=False, now=10 * SILENCE) == StatusSeen(names[8])
    assert liveness.message("d0", online=False, now=10 * SILENCE) is None


def test_a_device_that_does_not_answer_the_servers_status_is_lost_sooner(liveness: Liveness) -> None:
    liveness.status(HERE, retained=False, now=0)
    liveness.connected(["d"], now=10)
    assert lost_at(liveness, 10) == 10 + ANSWER


def test_a_device_of_an_earlier_server_is_lost_if_it_does_not_answer(liveness: Liveness) -> None:
    liveness.lost([HERE], now=5)
    liveness.connected(["d"], now=6)
    assert lost_at(liveness, 6) == 6 + ANSWER


def test_nobody_is_lost_while_the_server_has_no_connection(liveness: Liveness) -> None:
    liveness.status(HERE, retained=False, now=0)
    liveness.disconnected(now=0)
    back = int(2 * SILENCE)
    assert not any(liveness.lost([HERE], now) for now in range(back))
    liveness.connected(["d"], now=back)
    assert lost_at(liveness, back) == back + ANSWER


def test_a_dead_device_is_lost_also_if_the_servers_connection_is_lost_every_minute(liveness: Liveness) -> None:
    alive = HERE.model_copy(update={"device": "alive"})
    now, lost = 0.0, []
    while not lost:
        liveness.connected(["d", "alive"], now)
        liveness.status(alive, retained=False, now=now + 1)
        lost = [event for second in range(2, 60) for event in liveness.lost([HERE, alive], now + second)]
        liveness.disconnected(now + 60)
        now += 65  # five of them without a connection
    assert {event.status.device for event in lost} == {"d"}
    assert now == 2 * 65


def test_nobody_is_lost_while_the_server_itself_is_busy(liveness: Liveness) -> None:
    liveness.status(HERE, retained=False, now=0)
    assert liveness.lost([HERE], now=1) == []
    busy = SILENCE + BUSY_SECONDS
    assert liveness.lost([HERE], now=busy) == []
    assert lost_at(liveness, busy) == SILENCE + busy - 1
