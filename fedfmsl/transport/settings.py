"""The settings of every process that talks to a broker."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from fedfmsl.common.settings import File, SettingsModel, checked, panel
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.topics import ROOT, check_name, check_prefix
from fedfmsl.transport.address import listening_on, parse_address

RunName = Annotated[str, checked(partial(check_name, "run"))]
DeviceName = Annotated[str, checked(partial(check_name, "device"))]
TopicPrefix = Annotated[str, checked(check_prefix)]
DiscoveryPrefix = Annotated[str, checked(lambda text: text and check_prefix(text))]
Broker = Annotated[str, checked(parse_address)]


def served(what: str, *permits: str) -> AfterValidator:
    """The check of a HOST:PORT where `what` is served. One of the settings `permits` allows it to other machines."""

    def check(address: str, info: ValidationInfo) -> str:
        try:
            listening_on(address, what, any(info.data.get(name) for name in permits))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return address

    return AfterValidator(check)


MetricsAddress = Annotated[str, served("metrics", "insecure")]
CONNECTION = panel("Connection")
SERVER_NAME = "server"  # common name or user name of the run's server
OPERATOR_NAME = "operator"  # of the person who removes old runs while a server runs
HOME_ASSISTANT = "homeassistant"  # its default discovery prefix


class AccessSettings(SettingsModel):
    """Who a process is, and whether its traffic may be unencrypted."""

    identity: File | None = Field(
        None,
        description="PEM file with client key, certificate and CA, for TLS. In a TOML file also its text.",
        json_schema_extra=CONNECTION,
    )
    insecure: bool = Field(
        False, description="Allow unencrypted traffic to other machines.", json_schema_extra=CONNECTION
    )


class ConnectionSettings(AccessSettings):
    """How a process reaches the broker, and who it is."""

    broker: Broker = Field(
        "mqtt://localhost:1883",
        description="Address of the MQTT broker: mqtt, mqtts, ws or wss://HOST[:PORT]. User and password: "
        "USER:PASSWORD@HOST, percent-encoded, or FEDFMSL_USER and FEDFMSL_PASSWORD.",
        json_schema_extra=CONNECTION,
    )
    topic_prefix: TopicPrefix = Field(
        ROOT,
        description="First levels of all MQTT topics, the same on server and devices. Brokers with several tenants "
        "need another one, like tenant-7/fedfmsl.",
        json_schema_extra=CONNECTION,
    )
