"""A device that has samples of new classes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from support.bundles import Built
from support.samples import CLASSES, set_dates, write_photos

from edge_runtime.daemon import prepare
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.prepare import Daemon, wait_for_classes
from edge_runtime.data.folder import SampleFolder
from edge_runtime.data.proposals import NothingToTrainError
from edge_runtime.resources.governor import Readings
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.protocol.messages import Activity, DeviceStatus, ServerStatus, encode, parse
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Received

TOPICS = Topics("r")


class RecordingLink(Link):
    """Not connected; keeps the statuses that it is to publish."""

    def publish(self, topic: str, payload: bytes, retain: bool = False, **more: Any) -> paho.MQTTMessageInfo:
        if topic == TOPICS.status("d"):
            self.statuses = [*getattr(self, "statuses", []), parse(DeviceStatus, payload)]
        return super().publish(topic, payload, retain, **more)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    monkeypatch.setattr(prepare, "SCAN_SECONDS", 0.01)
    monkeypatch.setattr(prepare, "POLL_SECONDS", 0.01)
    monkeypatch.setattr("edge_runtime.daemon.download.POLL_SECONDS", 0.01)
    settings = Settings(run="r", images=tmp_path / "photos", broker="mqtt://127.0.0.1:9")
    (tmp_path / "state").mkdir()
    link, store = RecordingLink(settings.broker, "d"), DeviceStore(tmp_path / "state")
    return Daemon(settings, link, TOPICS, store, "d", HealthReporter(link, TOPICS, "d", store, Readings))


def test_without_proposals_no_name_of_a_new_class_leaves_the_device(daemon: Daemon, vit: Built) -> None:
    photos = daemon.settings.images
    set_dates(write_photos(photos, 3, [CLASSES[0], "fig"]))
    scanned = [SampleFolder(photos, vit.bundle, daemon.store, proposes=each).scan().proposed for each in (True, False)]
    assert scanned == [{"fig": 3}, {}]


@pytest.mark.parametrize("news", ["task", "photos"])
def test_a_device_with_new_classes_only_proposes_them_until_it_can_train(daemon: Daemon, vit: Built, news: str) -> None:
    photos = daemon.settings.images
    set_dates(write_photos(photos, 3, ["fig"]))
    folder = SampleFolder(photos, vit.bundle, daemon.store)
    with pytest.raises(NothingToTrainError) as caught:
        folder.scan()
    task = "f" * 64 if news == "task" else vit.bundle.task.sha256
    server = ServerStatus(online=True, run="r", session="s", bundle=vit.bundle.sha256, task=task)
    daemon.link.events.put(Received(TOPICS.server_status, encode(server)))
    if news == "photos":
        set_dates(write_photos(photos, 3, [CLASSES[0]]))
    wait_for_classes(daemon, vit.bundle, folder, caught.value)
    assert isinstance(daemon.link, RecordingLink)
    status = daemon.link.statuses[0]
    assert status.proposed == {"fig": 3}
    assert "no images to train on" in status.error
    shown = daemon.health.newest
    assert shown is not None and shown.activity is Activity.PAUSED and "no images to train on" in shown.paused
