"""The settings of every process that talks to a broker."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from fedfmsl.common.settings import File, SettingsModel, checked, panel
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.topics import ROOT, check_name, check_prefix
from fedfmsl.transport.address import parse_address, require_loopback
from fedfmsl.transport.listening import parse_listen, parse_reachable

RunName = Annotated[str, checked(partial(check_name, "run"))]
DeviceName = Annotated[str, checked(partial(check_name, "device"))]
TopicPrefix = Annotated[str, checked(check_prefix)]
DiscoveryPrefix = Annotated[str, checked(lambda text: text and check_prefix(text))]
Broker = Annotated[str, checked(parse_address)]
Reachable = Annotated[str, checked(parse_reachable)]


def served(what: str, *permits: str) -> AfterValidator:
    """The check of a HOST:PORT where `what` is served. One of the settings `permits` allows it to other machines."""

    def check(address: str, info: ValidationInfo) -> str:
        try:
            host, _ = parse_listen(address)
            if not any(info.data.get(name) for name in permits):
                identity = "pass --identity, " if "identity" in permits else ""
                require_loopback(what, host, f"{identity}let it listen on 127.0.0.1")
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return address

    return AfterValidator(check)


MetricsAddress = Annotated[str, served("metrics", "insecure")]
PageAddress = Annotated[str, served("the page", "insecure", "identity")]  # with an identity it uses TLS
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
