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

from fedfmsl.errors import ConfigError, one_line
from fedfmsl.protocol.class_names import UNKNOWN
from fedfmsl.protocol.messages import Activity
from fedfmsl.protocol.topics import Topics, discovery_topic

PRODUCT = "FedFMSL Edge"
# Home Assistant does not record the attributes of a state if their JSON has more than 16,384 bytes. They are the
# options of a sensor and what its template selects.
MAX_OPTIONS_BYTES = 7000
PROBABILITIES = 10  # the highest ones, among the attributes
MAX_STATE = 255  # characters
_ID = re.compile(r"[a-zA-Z0-9_-]+")  # valid in a level of a discovery topic


@dataclass(frozen=True)
class DeviceDescription:
    """`model`: name of the board, or "". `page`: address of the device's page, or ""."""

    topics: Topics
    name: str
    classes: Sequence[str]
    model: str = ""
    version: str = ""
    page: str = ""


def discovery_message(prefix: str, device: DeviceDescription, status_topic: str, health: bool) -> tuple[str, bytes]:
    """Topic and payload of the message, to be published as retained.

    `status_topic`: topic of the device's DeviceStatus. `health`: also describe the sensors of the health messages.
    Raises ConfigError if the run name or the device name is not valid in a discovery topic.
    """
    topics = device.topics
    for kind, name in (("run", topics.run), ("device", device.name)):
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
            "identifiers": [f"{topics.root}/{device.name}"],
            "name": device.name,
            "manufacturer": PRODUCT,
            **({"model": device.model} if device.model else {}),
            **({"sw_version": device.version} if device.version else {}),
            **({"configuration_url": device.page} if device.page else {}),
        },
        "origin": {"name": PRODUCT, **({"sw_version": device.version} if device.version else {})},
        "availability": [
            {"topic": status_topic, "value_template": "{{ 'online' if value_json.online else 'offline' }}"},
        ],
        "qos": 1,
        "components": {
            key: {"platform": "sensor", "unique_id": f"{topics.root}/{device.name}/{key}", **component}
            for key, component in components.items()
        },
    }
    return discovery_topic(prefix, topics.run, device.name), json.dumps(payload).encode()


def _predictions(topic: str, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    # as published: a message holds a class name as one line
    options = list(dict.fromkeys(one_line(name)[:MAX_STATE] for name in (*classes, UNKNOWN)))
    listed = len(json.dumps(options, ensure_ascii=False).encode()) <= MAX_OPTIONS_BYTES
    highest = f"dict((value_json.probabilities | dictsort(by='value', reverse=true))[:{PROBABILITIES}])"
    return {
        "class": {
            "name": "Class",
            **({"device_class": "enum", "options": options} if listed else {}),
            "state_topic": topic,
            "value_template": f"{{{{ value_json.label[:{MAX_STATE}] }}}}",
            "json_attributes_topic": topic,
            "json_attributes_template": f"{{{{ dict(value_json, probabilities={highest}) | tojson }}}}",
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
