"""Discovery messages against the schema of Home Assistant's MQTT integration (device discovery and its sensors)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Literal

import pytest
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from edge_runtime.inference.home_assistant import DeviceDescription, discovery_message
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.messages import Activity, Health, Prediction, encode
from fedfmsl.protocol.topics import Topics

Template = str
TOPIC = re.compile(r"(?P<component>\w+)/(?:(?P<node_id>[a-zA-Z0-9_-]+)/)?(?P<object_id>[a-zA-Z0-9_-]+)/config")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sensor(Strict):
    """The options of an MQTT sensor that we use, and the rules between them."""

    platform: Literal["sensor"]
    unique_id: str
    name: str
    state_topic: str
    value_template: Template
    json_attributes_topic: str | None = None
    json_attributes_template: Template | None = None
    device_class: Literal["enum", "temperature"] | None = None
    options: list[str] | None = Field(default=None, min_length=1)
    state_class: Literal["measurement"] | None = None
    unit_of_measurement: str | None = None
    entity_category: Literal["diagnostic"] | None = None
    suggested_display_precision: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def rules(self) -> Sensor:
        assert (self.options is not None) == (self.device_class == "enum")
        if self.options is not None:
            assert self.state_class is self.unit_of_measurement is None
            assert len(set(self.options)) == len(self.options)
        if self.device_class == "temperature":
            assert self.unit_of_measurement in ("°C", "°F", "K")
        return self


class Device(Strict):
    identifiers: list[str] = Field(min_length=1)
    name: str
    manufacturer: str
    model: str | None = None
    sw_version: str | None = None
    configuration_url: str | None = Field(default=None, pattern="^(https?|homeassistant)://")


class Origin(Strict):
    name: str
    sw_version: str | None = None


class Availability(Strict):
    topic: str
    value_template: Template


class Discovery(Strict):
    device: Device
    origin: Origin
    availability: list[Availability]
    qos: Literal[0, 1, 2]
    components: dict[str, Sensor]


KITCHEN = DeviceDescription(Topics("orchard"), "kitchen", ("apple", "plum"), model="Raspberry Pi 5", version="0.1.0")


def message_of(device: DeviceDescription, health: bool) -> tuple[str, Discovery]:
    topic, payload = discovery_message("homeassistant", device, "some/topic", health)
    return topic, Discovery.model_validate_json(payload)


@pytest.mark.parametrize("health", [False, True])
def test_the_message_is_valid_in_home_assistant(health: bool) -> None:
    topic, message = message_of(KITCHEN, health)
    found = TOPIC.fullmatch(topic.removeprefix("homeassistant/"))
    assert found is not None
    assert found.groups() == ("device", "orchard", "kitchen")
    assert set(message.components) == {"class", "confidence"} | ({"temperature", "activity"} if health else set())
    assert message.availability[0].topic == "some/topic"
    assert len({sensor.unique_id for sensor in message.components.values()}) == len(message.components)
    assert (message.device.model, message.device.sw_version) == ("Raspberry Pi 5", "0.1.0")


def test_the_device_links_to_its_page() -> None:
    assert message_of(KITCHEN, health=False)[1].device.configuration_url is None
    with_page = replace(KITCHEN, page="http://192.168.1.7:8080/")
    assert message_of(with_page, health=False)[1].device.configuration_url == "http://192.168.1.7:8080/"


def test_sensors_read_existing_fields_of_our_messages() -> None:
    topics = Topics("orchard")
    read = {topics.prediction("kitchen"): Prediction, topics.health("kitchen"): Health}
    for sensor in message_of(KITCHEN, health=True)[1].components.values():
        (field,) = re.findall(r"value_json\.(\w+)", sensor.value_template)
        assert field in read[sensor.state_topic].model_fields
        assert sensor.json_attributes_topic in (None, sensor.state_topic)


def test_every_state_is_among_the_options() -> None:
    components = message_of(KITCHEN, health=True)[1].components
    assert components["class"].options == ["apple", "plum", "unknown"]
    assert components["activity"].options == [activity.value for activity in Activity]
    odd = DeviceDescription(Topics("orchard"), "kitchen", ("unknown", "plum"))
    assert message_of(odd, health=False)[1].components["class"].options == ["unknown", "plum"]


def published(classes: list[str], best: int) -> dict[str, object]:
    """A prediction as Home Assistant receives it."""
    probabilities = {name: 0.987654321 if name == classes[best] else 0.012345678901 / len(classes) for name in classes}
    prediction = Prediction(
        device="kitchen", file="/data/inbox/2026-11-26.jpg", time=1.5, label=classes[best], confidence=0.9876,
        probabilities=probabilities, round=3,
    )  # fmt: skip
    return TypeAdapter(dict[str, object]).validate_json(encode(prediction))


@pytest.mark.parametrize(
    "classes",
    [
        [f"species-{number:04d}" for number in range(400)],
        [f"species-{number:04d}" for number in range(4000)],
        [f"{'水' * 290}{number}" for number in range(30)],
        ["a  pple\t", "zwei\nZeilen"],
    ],
    ids=["400", "4000", "long", "spaces"],
)
def test_states_and_attributes_fit_into_home_assistant(classes: list[str]) -> None:
    sensor = message_of(DeviceDescription(Topics("orchard"), "kitchen", classes), health=False)[1].components["class"]
    assert sensor.json_attributes_template is not None
    received = published(classes, best=1)
    render = SandboxedEnvironment().from_string
    state = render(sensor.value_template).render(value_json=received)
    attributes = json.loads(render(sensor.json_attributes_template).render(value_json=received))
    assert len(state) <= 255
    assert received["label"] in attributes["probabilities"]
    assert {key: value for key, value in attributes.items() if key != "probabilities"} == {
        key: value for key, value in received.items() if key != "probabilities"
    }
    if sensor.options is not None:
        assert state in sensor.options
        attributes["options"] = sensor.options
    assert len(json.dumps(attributes, ensure_ascii=False).encode()) < 16_000  # the recorder's limit is 16,384


def test_devices_and_sensors_have_unique_identifiers() -> None:
    names = [("a-b", "c"), ("a", "b-c"), ("a", "b"), ("b", "a")]
    messages = [message_of(DeviceDescription(Topics(run), name, ("apple",)), health=True) for run, name in names]
    assert len({topic for topic, _ in messages}) == len(names)
    assert len({message.device.identifiers[0] for _, message in messages}) == len(names)
    assert len({sensor.unique_id for _, message in messages for sensor in message.components.values()}) == 4 * len(
        names
    )


def test_unknown_board_and_version_are_left_out() -> None:
    _, payload = discovery_message(
        "homeassistant", DeviceDescription(Topics("orchard"), "kitchen", ("apple",)), "t", health=False
    )
    device = TypeAdapter(dict[str, object]).validate_json(payload)["device"]
    assert device == {"identifiers": ["fedfmsl/orchard/kitchen"], "name": "kitchen", "manufacturer": "FedFMSL Edge"}


@pytest.mark.parametrize(("run", "name", "wrong"), [("orchard", "pi.kitchen", "device"), ("v1.2", "kitchen", "run")])
def test_a_name_that_is_invalid_in_a_discovery_topic_is_one_line_of_error(run: str, name: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{wrong} name .*--home-assistant ") as caught:
        discovery_message("homeassistant", DeviceDescription(Topics(run), name, ("apple",)), "t", health=False)
    assert "\n" not in str(caught.value)
