"""Publishes predictions to the broker, for `edge_runtime predict --publish` on a machine without a daemon."""

from __future__ import annotations

import secrets
import time
from importlib.metadata import version
from pathlib import PurePath
from types import TracebackType

from edge_runtime.inference.classifier import Classifier
from edge_runtime.inference.home_assistant import DeviceDescription, discovery_message
from edge_runtime.settings import PredictSettings
from fedfmsl.common.backoff import Backoff
from fedfmsl.errors import BrokerError, ConfigError
from fedfmsl.protocol.messages import DeviceStatus, Prediction, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.bounded_client import RECONNECT
from fedfmsl.transport.identity import read_identity
from fedfmsl.transport.link import Connected, Disconnected, Link, Will

SHORT_SECONDS = 10.0  # a connection that a second client with this identity ends is shorter: it reconnects at once
MAX_SHORT = 2  # short connections in a row; a broker that restarts ends one


def as_published(prediction: Prediction, device: str) -> bytes:
    """A prediction as it leaves the device: in the device's name, with the file's name but not its folder. If the
    message were too long, it has only the most probable classes."""
    sent = prediction.model_copy(update={"device": device, "file": PurePath(prediction.file).name})
    payload = encode(sent)
    best = sorted(sent.probabilities.items(), key=lambda item: -item[1])
    while len(payload) > Prediction.max_bytes:
        best = best[: len(best) * Prediction.max_bytes // len(payload)]
        payload = encode(sent.model_copy(update={"probabilities": dict(best)}))
    return payload


class Publisher:
    """Publishes retained predictions and a retained status, under the device name of the identity file or the model."""

    def __init__(self, classifier: Classifier, settings: PredictSettings, reconnect: Backoff = RECONNECT) -> None:
        """Raises ConfigError if the run name is missing or a setting is invalid."""
        if settings.run is None:
            raise ConfigError("--publish needs --run NAME: the run to publish in")
        identity = settings.identity
        self._device = (read_identity(identity).name if identity else None) or classifier.device
        self._topics = topics = Topics(settings.run, settings.topic_prefix)
        self._discovery: tuple[str, bytes] | None = None
        if settings.home_assistant:
            description = DeviceDescription(topics, self._device, classifier.classes, version=version("fedfmsl-edge"))
            status_topic = topics.prediction_status(self._device)
            self._discovery = discovery_message(settings.home_assistant, description, status_topic, health=False)
        self._connected: float | None = None  # since when
        self._short = 0  # connections in a row
        self._link = Link(
            settings.broker,
            topics.client_id(self._device, "predict", secrets.token_hex(8)),
            Will(topics.prediction_status(self._device), self._status(online=False)),
            identity=identity,
            insecure=settings.insecure,
            reconnect=reconnect,
        )

    def __enter__(self) -> Publisher:
        """Raises BrokerError if the broker cannot be reached."""
        self._link.connect()
        self._handle_connection_events()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        topic = self._topics.prediction_status(self._device)
        self._link.close(self._link.publish(topic, self._status(online=False), retain=True))

    def publish(self, prediction: Prediction | None) -> None:
        """With None, only handles connection events. Raises BrokerError if the broker ends every connection."""
        self._handle_connection_events()
        if prediction is not None:
            topic = self._topics.prediction(self._device)
            self._link.publish(topic, as_published(prediction, self._device), retain=True)

    def _handle_connection_events(self) -> None:
        """Publishes discovery and status after every connect, because the broker may have published the last will."""
        while (event := self._link.next_event(0)) is not None:
            if isinstance(event, Connected):
                self._connected = time.monotonic()
                if self._discovery is not None:
                    self._link.publish(*self._discovery, retain=True)
                self._link.publish(self._topics.prediction_status(self._device), self._status(online=True), retain=True)
            elif isinstance(event, Disconnected) and self._connected is not None:
                self._count(time.monotonic() - self._connected)
                self._connected = None

    def _count(self, seconds: float) -> None:
        """A broker that allows one connection per identity ends this one when a daemon with the same identity
        reconnects, and the daemon's when this one does. So one of them has to end."""
        self._short = self._short + 1 if seconds < SHORT_SECONDS else 0
        if self._short >= MAX_SHORT:
            raise BrokerError(
                f"the broker has ended {self._short} connections of {self._device!r} at once: a daemon with its "
                "identity runs, or another predict --publish; set the daemon's `watch`, or use another --identity"
            )

    def _status(self, online: bool) -> bytes:
        return encode(DeviceStatus(device=self._device, online=online))
