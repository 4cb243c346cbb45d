"""Publishes predictions to the broker, for `edge_runtime predict --publish` on a machine without a daemon."""

from __future__ import annotations

import secrets
from importlib.metadata import version
from types import TracebackType

from edge_runtime.inference.classifier import Classifier
from edge_runtime.inference.home_assistant import DeviceDescription, discovery_message
from edge_runtime.settings import PredictSettings
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import DeviceStatus, Prediction, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.identity import read_identity
from fedfmsl.transport.link import Connected, Link, Will


class Publisher:
    """Publishes retained predictions and a retained status, under the device name of the identity file or the model."""

    def __init__(self, classifier: Classifier, settings: PredictSettings) -> None:
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
        self._link = Link(
            settings.broker,
            topics.client_id(self._device, "predict", secrets.token_hex(8)),
            Will(topics.prediction_status(self._device), self._status(online=False)),
            identity=identity,
            insecure=settings.insecure,
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
        """With None, only handles connection events."""
        self._handle_connection_events()
        if prediction is not None:
            renamed = prediction.model_copy(update={"device": self._device})
            self._link.publish(self._topics.prediction(self._device), encode(renamed), retain=True)

    def _handle_connection_events(self) -> None:
        """Publishes discovery and status after every connect, because the broker may have published the last will."""
        while (event := self._link.next_event(0)) is not None:
            if isinstance(event, Connected):
                if self._discovery is not None:
                    self._link.publish(*self._discovery, retain=True)
                self._link.publish(self._topics.prediction_status(self._device), self._status(online=True), retain=True)

    def _status(self, online: bool) -> bytes:
        return encode(DeviceStatus(device=self._device, online=online))
