"""A device as Home Assistant discovers it over MQTT: one retained message that names its sensors and where they read.

It is the device form of discovery (Home Assistant 2024.11 or newer), under PREFIX/device/RUN/DEVICE/config. An empty
retained message there removes the device again.
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
_ID = re.compile(r"[a-zA-Z0-9_-]+")  # what Home Assistant takes as part of a discovery topic


@dataclass(frozen=True)
class Described:
    """What is said of a device. `model` is its board, and may be empty."""

    run: str
    name: str
    classes: Sequence[str]
    model: str = ""
    version: str = ""


def discovery(prefix: str, device: Described, available: str, health: bool) -> tuple[str, bytes]:
    """The topic and the payload, to be retained. `available`: the topic of a DeviceStatus, whose `online` says whether
    the device is there; `health`: whether there are messages on its health, too.

    Raises ConfigError if Home Assistant takes no topic with such a run or device in it.
    """
    topics = Topics(device.run)
    for kind, name in (("run", device.run), ("device", device.name)):
        if not _ID.fullmatch(name):
            raise ConfigError(
                f"{kind} name {name!r} is not one for Home Assistant, which takes letters, digits, '_' and '-'; give "
                'another, or --home-assistant ""'
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
            {"topic": available, "value_template": "{{ 'online' if value_json.online else 'offline' }}"},
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
            "value_template": "{{ value_json.temperature }}",  # "None", where it has none, is what is read as unknown
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
