"""A fleet from devices.provision on a real mosquitto, and identities that do not belong to it."""

from __future__ import annotations

import getpass
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from devices.provisioning.authority import CLIENT, Authority, Issued, load_authority, make_authority
from support.processes import Ended, Processes, answers, free_port, run_module, wait_until
from support.tools import require_tool

LONG_AGO = datetime.now(timezone.utc) - timedelta(days=2000)
HOSTS = ("--host", "localhost", "--host", "127.0.0.1")


def provision(pki: Path, *arguments: str) -> Ended:
    ended = run_module("devices.provision", "--pki", str(pki), *arguments)
    assert ended.code == 0, ended.stderr
    return ended


def authority_of(pki: Path) -> Authority:
    return load_authority((pki / "ca.crt").read_bytes(), (pki / "ca.key").read_bytes())


def write_identity(path: Path, issued: Issued | None, authority: Authority) -> Path:
    path.write_text((issued.key_pem + issued.certificate_pem if issued else "") + authority.certificate_pem)
    path.chmod(0o600)
    return path


def expired_identity(pki: Path, path: Path) -> Path:
    authority = authority_of(pki)
    return write_identity(path, authority.issue("device-0", [CLIENT], days=30, now=LONG_AGO), authority)


def foreign_identity(pki: Path, path: Path) -> Path:
    """An identity of another CA, which trusts the fleet's CA."""
    return write_identity(path, make_authority("another fleet").issue("device-0", [CLIENT]), authority_of(pki))


@dataclass
class Fleet:
    """The PKI and the broker with the provisioned configuration."""

    pki: Path
    port: int
    websocket_port: int

    @property
    def url(self) -> str:
        return f"mqtts://localhost:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"wss://localhost:{self.websocket_port}"

    @property
    def server(self) -> Path:
        return self.pki / "server.pem"

    def device(self, name: str) -> Path:
        return self.pki / "devices" / f"{name}.toml"


def home_assistant(pki: Path) -> Path:
    """Home Assistant's key and certificate and the CA's as one identity file."""
    path = pki / "homeassistant.pem"
    path.write_text("".join((pki / name).read_text() for name in ("homeassistant.key", "homeassistant.crt", "ca.crt")))
    path.chmod(0o600)
    return path


def start_fleet(pki: Path, processes: Processes) -> Fleet:
    """Starts mosquitto with the provisioned configuration on free ports, and its WebSocket listener."""
    fleet = Fleet(pki, free_port(), free_port())
    conf = (pki / "broker" / "mosquitto.conf").read_text()
    listener = re.search(r"^listener 8883\n(.*?^use_username_as_clientid true\n)", conf, re.DOTALL | re.MULTILINE)
    assert listener
    websocket = f"listener {fleet.websocket_port}\nprotocol websockets\n{listener[1]}"
    conf = conf.replace("listener 8883", f"user {getpass.getuser()}\n{websocket}listener {fleet.port}")
    path = pki / "test.conf"
    path.write_text(conf)
    broker = processes.start("mosquitto", require_tool("mosquitto"), "-c", str(path))
    wait_until(lambda: answers(fleet.port) or not broker.running, f"mosquitto on port {fleet.port}")
    assert broker.running, broker.wait().stderr
    return fleet
