"""Predictions as Frigate publishes those of its own classification models (state classification, Frigate 0.17).

Its topic is PREFIX/CAMERA/classification/MODEL, and its payload the name of the class as text. Home Assistant's Frigate
integration and notifiers read it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fedfmsl.errors import ConfigError
from fedfmsl.protocol.class_names import UNKNOWN

if TYPE_CHECKING:
    from fedfmsl.protocol.messages import Prediction

MAX_TOPIC_BYTES = 1024
_TOPIC = re.compile(r"[^+#\0]+/[^/+#\0]+/classification/[^/+#\0]+")


def check_state_topic(topic: str) -> str:
    """Raises ConfigError if it is not a topic of Frigate's state classification."""
    if not _TOPIC.fullmatch(topic) or not topic.isprintable() or len(topic.encode()) > MAX_TOPIC_BYTES:
        raise ConfigError(
            f"{topic!r} is not a topic of Frigate's state classification; write it like "
            "frigate/front_door/classification/door"
        )
    return topic


def state_payload(prediction: Prediction) -> bytes | None:
    """The payload; None if there is nothing to publish: Frigate publishes no unknown state either."""
    return None if prediction.label == UNKNOWN else prediction.label.encode()
