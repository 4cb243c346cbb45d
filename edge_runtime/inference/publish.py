"""Predictions on the broker, where no daemon is there to publish them."""

from __future__ import annotations

import secrets
from importlib.metadata import version
from types import TracebackType

from edge_runtime.inference.classifier import Classifier
from edge_runtime.inference.home_assistant import Described, discovery
from edge_runtime.settings import PredictSettings
from fedfmsl.common.cli import notice
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import DeviceStatus, Prediction, encode
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.identity import read_identity
from fedfmsl.transport.link import Connected, Disconnected, Link, Will


class Publisher:
    """Speaks for the device of an identity, or else for the one whose model it is. Predictions are retained, and so is
    whether it is there."""

    def __init__(self, classifier: Classifier, settings: PredictSettings) -> None:
        """Raises ConfigError if it is not said in which run, or a setting has an unusable value."""
        if settings.run is None:
            raise ConfigError("--publish needs --run NAME: the run to publish in")
        identity = settings.identity
        self._device = (read_identity(identity).name if identity else None) or classifier.device
        self._topics = topics = Topics(settings.run)
        self._introduction: tuple[str, bytes] | None = None
        if settings.home_assistant:
            described = Described(settings.run, self._device, classifier.classes, version=version("fedfmsl-edge"))
            available = topics.predicting(self._device)
            self._introduction = discovery(settings.home_assistant, described, available, health=False)
        self._link = Link(
            settings.broker,
            f"fedfmsl-{settings.run}-{self._device}-predict-{secrets.token_hex(8)}",
            Will(topics.predicting(self._device), self._status(online=False)),
            identity=identity,
            insecure=settings.insecure,
        )

    def __enter__(self) -> Publisher:
        """Raises BrokerError if the broker cannot be reached."""
        self._link.connect()
        self._keep_up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        topic = self._topics.predicting(self._device)
        self._link.close(self._link.publish(topic, self._status(online=False), retain=True))

    def tell(self, prediction: Prediction | None) -> None:
        """None stands for a pause."""
        self._keep_up()
        if prediction is not None:
            said = prediction.model_copy(update={"device": self._device})
            self._link.publish(self._topics.prediction(self._device), encode(said), retain=True)

    def _keep_up(self) -> None:
        """Introduces itself after every connection: the broker may have said meanwhile that it was gone."""
        while (event := self._link.next_event(0)) is not None:
            if isinstance(event, Disconnected):
                notice(f"no connection to the broker ({event.reason}); trying again and again")
            if isinstance(event, Connected):
                if self._introduction is not None:
                    self._link.publish(*self._introduction, retain=True)
                self._link.publish(self._topics.predicting(self._device), self._status(online=True), retain=True)

    def _status(self, online: bool) -> bytes:
        return encode(DeviceStatus(device=self._device, online=online))
