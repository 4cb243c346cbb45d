"""The MQTT discovery message of Home Assistant: a retained message with a device's sensors and their topics.

It uses device discovery (Home Assistant 2024.11 or newer), under PREFIX/device/RUN/DEVICE/config. An empty retained
message on that topic removes the device from Home Assistant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedfmsl.algorithms.calibration import UNKNOWN
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import Activity
from fedfmsl.protocol.topics import Topics

PRODUCT = "FedFMSL Edge"
_ID = re.compile(r"[a-zA-Z0-9_-]+")  # valid in a level of a discovery topic


@dataclass(frozen=True)
class DeviceDescription:
    """`model`: name of the board, or ""."""

    run: str
    name: str
    classes: Sequence[str]
    model: str = ""
    version: str = ""


def discovery_message(prefix: str, device: DeviceDescription, status_topic: str, health: bool) -> tuple[str, bytes]:
    """Topic and payload of the message, to be published as retained.

    `status_topic`: topic of the device's DeviceStatus. `health`: also describe the sensors of the health messages.
    Raises ConfigError if the run name or the device name is not valid in a discovery topic.
    """
    topics = Topics(device.run)
    for kind, name in (("run", device.run), ("device", device.name)):
        if not _ID.fullmatch(name):
            raise ConfigError(
                f"{kind} name {name!r} is not valid in Home Assistant, which allows letters, digits, '_' and '-'; "
                'choose another name, or pass --home-assistant ""'
            )
    components = _predictions(topics.prediction(device.name), device.classes)
    if health:
        components |= _health(topics.health(device.name))
    payload = {
        "device": {
            "identifiers": [f"fedfmsl/{device.run}/{device.name}"],
            "name": device.name,
            "manufacturer": PRODUCT,
            **({"model": device.model} if device.model else {}),
            **({"sw_version": device.version} if device.version else {}),
        },
        "origin": {"name": PRODUCT, **({"sw_version": device.version} if device.version else {})},
        "availability": [
            {"topic": status_topic, "value_template": "{{ 'online' if value_json.online else 'offline' }}"},
        ],
        "qos": 1,
        "components": {
            key: {"platform": "sensor", "unique_id": f"fedfmsl/{device.run}/{device.name}/{key}", **component}
            for key, component in components.items()
        },
    }
    return f"{prefix}/device/{device.run}/{device.name}/config", json.dumps(payload).encode()


def _predictions(topic: str, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        "class": {
            "name": "Class",
            "device_class": "enum",
            "options": list(dict.fromkeys([*classes, UNKNOWN])),
            "state_topic": topic,
            "value_template": "{{ value_json.label }}",
            "json_attributes_topic": topic,
        },
        "confidence": {
            "name": "Confidence",
            "unit_of_measurement": "%",
            "state_class": "measurement",
            "suggested_display_precision": 1,
            "state_topic": topic,
            "value_template": "{{ value_json.confidence * 100 }}",
        },
    }


def _health(topic: str) -> dict[str, dict[str, Any]]:
    return {
        "temperature": {
            "name": "Temperature",
            "device_class": "temperature",
            "unit_of_measurement": "°C",
            "state_class": "measurement",
            "entity_category": "diagnostic",
            "state_topic": topic,
            "value_template": "{{ value_json.temperature }}",  # Home Assistant reads "None" as unknown
        },
        "activity": {
            "name": "Activity",
            "device_class": "enum",
            "options": [activity.value for activity in Activity],
            "entity_category": "diagnostic",
            "state_topic": topic,
            "value_template": "{{ value_json.activity }}",
            "json_attributes_topic": topic,
        },
    }
