"""A device that waits before its first round: for samples, for a new class in the task, for a new run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from support.bundles import Built
from support.samples import CLASSES, set_dates, write_photos
from support.training_contexts import announced_round

from edge_runtime.daemon import prepare
from edge_runtime.daemon.health import HealthReporter
from edge_runtime.daemon.prepare import Daemon, RunOverError, wait_for_samples
from edge_runtime.data.folder import SampleFolder
from edge_runtime.data.proposals import NothingToTrainError
from edge_runtime.resources.governor import Readings
from edge_runtime.settings import Settings
from edge_runtime.store import DeviceStore
from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import BundleError, InputError
from fedfmsl.protocol.messages import Activity, DeviceStatus, ServerStatus, Stage, encode, parse
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
    monkeypatch.setattr(prepare, "HEAR_SECONDS", 0.01)
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
    wait_for_samples(daemon, vit.bundle, folder, caught.value)
    assert isinstance(daemon.link, RecordingLink)
    status = daemon.link.statuses[0]
    assert status.proposed == {"fig": 3}
    assert "no images to train on" in status.error
    shown = daemon.health.newest
    assert shown is not None and shown.activity is Activity.PAUSED and "no images to train on" in shown.paused


class WaitsError(Exception):
    """Instead of a device that waits."""


@pytest.mark.parametrize(("anew", "stay", "waits"), [(False, False, False), (False, True, True), (True, False, True)])
def test_only_a_first_start_of_a_plain_command_ends_without_samples(
    daemon: Daemon, vit: Built, monkeypatch: pytest.MonkeyPatch, anew: bool, stay: bool, waits: bool
) -> None:
    def wait(_: Daemon, __: object, ___: object, error: InputError) -> None:
        raise WaitsError(str(error))

    monkeypatch.setattr(prepare, "wait_for_samples", wait)
    daemon.settings.images.mkdir()
    daemon = replace(daemon, settings=daemon.settings.model_copy(update={"stay": stay, "bundle": vit.bundle.root}))
    task = vit.bundle.task
    daemon.store.tasks.keep(task)
    server = ServerStatus(online=True, run="r", session="s", bundle=vit.bundle.sha256, task=task.sha256)
    daemon.link.events.put(Received(TOPICS.server_status, encode(server)))
    with pytest.raises(WaitsError if waits else NothingToTrainError, match="holds no images"):
        prepare.prepare(daemon, anew)


def test_a_device_waits_for_samples_also_without_the_disk_until_its_run_has_finished(
    daemon: Daemon, vit: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = daemon.settings.images
    photos.mkdir()
    folder = SampleFolder(photos, vit.bundle, daemon.store)
    with pytest.raises(NothingToTrainError) as caught:
        folder.scan()
    shutil.rmtree(photos)
    daemon.store.outbox.enter("s", "r")
    link = daemon.link
    assert isinstance(link, RecordingLink)
    server = ServerStatus(online=True, run="r", session="s", bundle=vit.bundle.sha256, task=vit.bundle.task.sha256)
    end = encode(announced_round(Stage.FINISHED, session="s"))

    def subscribe(topic: str) -> None:
        """Receives what the broker has retained: the server is online until the second status."""
        online = len(link.statuses) < 2
        if topic == TOPICS.server_status:
            link.events.put(Received(topic, encode(server.model_copy(update={"online": online}))))
        elif not online:
            link.events.put(Received(topic, end))

    monkeypatch.setattr(link, "subscribe", subscribe)
    with pytest.raises(RunOverError):
        wait_for_samples(daemon, vit.bundle, folder, caught.value)
    first, second, *_ = (status.error for status in link.statuses)
    assert "holds no images" in first and "does not exist" in second


def servers_of_two_runs(daemon: Daemon, vit: Built) -> tuple[ServerStatus, ServerStatus]:
    """Those of the finished run, whose task the device has, and of the one after it. Both are online."""
    task = vit.bundle.task
    daemon.store.tasks.keep(task)
    finished = ServerStatus(online=True, run="r", session="s", bundle=vit.bundle.sha256, task=task.sha256)
    return finished, finished.model_copy(update={"session": "s2"})


def test_a_late_device_without_the_bundle_waits_also_while_the_server_of_the_finished_run_is_back(
    daemon: Daemon, vit: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, (back, new) = daemon.link, servers_of_two_runs(daemon, vit)
    heard = [back.model_copy(update={"online": False}), back, back, new]

    def subscribe(topic: str) -> None:
        if topic == TOPICS.round:
            link.events.put(Received(topic, encode(announced_round(Stage.FINISHED, session="s"))))
            link.events.put(Received(TOPICS.server_status, encode(heard.pop(0) if heard[1:] else new)))

    monkeypatch.setattr(link, "subscribe", subscribe)
    monkeypatch.setattr("edge_runtime.daemon.download.RESUBSCRIBE", Backoff(0.01, 0.01))
    with pytest.raises(BundleError, match="does not serve its bundle"):  # of the new run
        prepare.prepare(daemon, anew=False)
    assert heard == [new]


def test_a_late_device_that_first_hears_the_server_of_the_finished_run_online_waits_for_another(
    daemon: Daemon, vit: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has no bundle for it, and goes offline once it has announced the end again."""
    link, (back, new) = daemon.link, servers_of_two_runs(daemon, vit)
    heard, waited = [back, back.model_copy(update={"online": False}), new], list[str]()

    def subscribe(topic: str) -> None:
        if topic == TOPICS.server_status:
            link.events.put(Received(topic, encode(heard.pop(0) if heard[1:] else new)))

    monkeypatch.setattr(link, "subscribe", subscribe)
    monkeypatch.setattr(prepare.logger, "warning", waited.append)
    with pytest.raises(BundleError, match="does not serve its bundle"):  # of the new run
        prepare.prepare(daemon, anew=False)
    assert len(waited) == 1 and "waits for it" in waited[0] and heard == [new]
