"""The description of a device's last health message."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edge_runtime.daemon.lock import locked
from edge_runtime.daemon.status import check_alive, describe
from edge_runtime.store import DeviceStore
from fedfmsl.errors import RunError
from fedfmsl.protocol.messages import MAX_HEARTBEAT_AGE, Activity, Health


@pytest.mark.parametrize(
    ("activity", "age", "expected"),
    [
        (Activity.WAITING, 40, "last heartbeat 0:00:40 ago, up for 0:01:40"),
        (Activity.STOPPED, 40, "last heartbeat 0:00:40 ago, ran for 0:01:00"),
        (Activity.WAITING, 10 * MAX_HEARTBEAT_AGE, ", ran for 0:01:00"),
    ],
)
def test_uptime_and_last_heartbeat_agree(tmp_path: Path, activity: Activity, age: float, expected: str) -> None:
    health = Health(device="kitchen", started=1000, time=1060, activity=activity)
    assert expected in dict(describe(health, DeviceStore(tmp_path), now=1060 + age))["now"]


def test_a_lost_connection_is_described_with_its_reason(tmp_path: Path) -> None:
    health = Health(device="kitchen", started=1000, time=1060, activity=Activity.WAITING)
    assert "broker" not in dict(describe(health, DeviceStore(tmp_path), now=1061))
    lost = health.model_copy(update={"disconnected": "Not authorized", "disconnected_since": 1050})
    broker = dict(describe(lost, DeviceStore(tmp_path), now=1061))["broker"]
    assert broker.startswith("no connection since 19") and broker.endswith("because: Not authorized")
    denied = health.model_copy(update={"refused": "the broker does not return this device's own status"})
    assert dict(describe(denied, DeviceStore(tmp_path), now=1061))["broker"] == denied.refused


def test_a_killed_daemon_is_noticed_before_its_heartbeat_is_old(tmp_path: Path) -> None:
    health = Health(device="kitchen", started=1000, time=time.time(), activity=Activity.WAITING)
    check_alive(health, tmp_path)  # no lock that this user can read: only the heartbeat counts
    with locked(tmp_path, "stop it"):
        check_alive(health, tmp_path)
    with pytest.raises(RunError, match=r"the daemon ended after its heartbeat .* ago; check its log"):
        check_alive(health, tmp_path)
