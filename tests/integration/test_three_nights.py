"""A fleet over three nights, on a real broker and with real devices. The clock on the server's wall is moved."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from support.bundles import Built
from support.coordinators import plan_for
from support.night_fleet import NightFleet, WallClock
from support.processes import Broker, Observer, wait_until
from support.samples import write_device_photos

from fedfmsl.common.hours import Hours
from fedfmsl.protocol.messages import Round, Stage


def test_three_nights(vit: Built, broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = WallClock(datetime(2026, 11, 27, 12))
    plan = plan_for(vit, run="nights", stage1_rounds=2, stage2_rounds=1, schedule=(Hours.parse("22:00-06:00"),))
    fleet = NightFleet(vit.bundle, broker, tmp_path, plan.config, clock)
    fleet.patch(monkeypatch)
    photos = {f"d{n}": write_device_photos(tmp_path / f"photos-{n}", {"apple": 8, "kiwi": 8}, seed=n) for n in range(3)}
    with Observer(broker, "nights") as observer:
        server = fleet.start_server()
        for name, folder in photos.items():
            fleet.start_device(name, folder)
        wait_until(lambda: "rests" in fleet.notes, "the server rests")
        wait_until(lambda: len(fleet.store.joined()) == 3, "all devices are online")
        clock.move(hours=11)
        observer.wait(Round, lambda r: r.stage is Stage.FINISHED, "the end")
        print(server.end(), [d.end() for d in fleet.devices.values()])
        print(fleet.notes)
