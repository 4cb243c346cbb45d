"""What a device publishes about itself: its last will, status, progress and predictions."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

import paho.mqtt.client as paho

from edge_runtime.data.features import Report
from edge_runtime.inference.publish import as_published
from edge_runtime.training.context import TrainingContext
from fedfmsl.protocol.frigate import state_payload
from fedfmsl.protocol.messages import DeviceStatus, Prediction, Progress, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.link import Link, Will

INSTANCE = secrets.token_hex(8)  # identifies this process among all processes with this device's name
PROGRESS_SECONDS = 0.5
Message = tuple[str, bytes]  # topic, payload


def device_link(broker: str, topics: Topics, name: str, identity: Path | None = None, insecure: bool = False) -> Link:
    """A device's link, whose last will says that the device is offline.

    The client id is this process's own: two processes with one device name do not push each other off the broker, and
    the broker keeps no messages for an absent client.
    """
    will = Will(topics.status(name), encode(DeviceStatus(device=name, online=False, instance=INSTANCE)))
    return Link(broker, topics.client_id(name, INSTANCE), will, identity=identity, insecure=insecure)


class Announcer:
    """Publishes a device's messages. `last`: the last message that the link must deliver before it closes."""

    def __init__(
        self, link: Link, topics: Topics, name: str, introduction: Message | None = None, frigate: str | None = None
    ) -> None:
        """`introduction` is the message that introduces this device to Home Assistant. `frigate`: the topic of a state
        classification of Frigate, where predictions are published too."""
        self.last: paho.MQTTMessageInfo | None = None
        self._link = link
        self._topics = topics
        self._name = name
        self._introduction = introduction
        self._frigate = frigate

    def introduce(self) -> None:
        """Publishes the introduction, after each connect: the broker may have lost its retained messages."""
        if self._introduction is not None:
            self.publish(*self._introduction, retain=True)

    def status(self, device: TrainingContext, online: bool = True, paused: str = "", error: str = "") -> None:
        status = _status_of(device, online, paused, error)
        self.publish(self._topics.status(self._name), encode(status), retain=True)

    def progress(self, activity: str, done: int, total: int) -> None:
        progress = Progress(device=self._name, activity=activity, done=done, total=total)
        self._link.publish(self._topics.progress(self._name), encode(progress), qos=0)

    def prediction(self, prediction: Prediction) -> None:
        """May be called in any thread."""
        self._link.publish(self._topics.prediction(self._name), as_published(prediction, self._name), retain=True)
        if self._frigate is not None and (state := state_payload(prediction)) is not None:
            self._link.publish(self._frigate, state, retain=True)

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> paho.MQTTMessageInfo:
        self.last = self._link.publish(topic, payload, retain)
        return self.last


def rate_limited(report: Report, seconds: float = PROGRESS_SECONDS) -> Report:
    """A Report that passes on at most one call every `seconds`, and every call with `done` = `total`."""
    last = 0.0

    def limited(activity: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last > seconds:
            last = now
            report(activity, done, total)

    return limited


def _status_of(device: TrainingContext, online: bool, paused: str, error: str) -> DeviceStatus:
    scanned = device.scanned
    return DeviceStatus(
        device=device.device_name,
        online=online,
        instance=INSTANCE,
        bundle=device.bundle.sha256,
        level_cap=device.level_cap,
        paused=paused,
        error=error,
        train=len(scanned.train),
        held_out=len(scanned.held_out),
        test=len(scanned.test),
        new_samples=scanned.new,
        proposed=dict(scanned.proposed),
    )
