"""The MQTT topics of a run. MQTT 3.1.1 only; every payload is a message of `protocol.messages` or a chunk."""

from __future__ import annotations

import re
from dataclasses import dataclass

from protocol.errors import ConfigError

ROOT = "fedfmsl"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(kind: str, name: str) -> str:
    """A run's or device's name as it may stand in a topic. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{kind} name {name!r} is unusable: use 1–64 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    return name


@dataclass(frozen=True)
class Topics:
    run: str

    def __post_init__(self) -> None:
        check_name("run", self.run)

    @property
    def server_status(self) -> str:
        return f"{ROOT}/{self.run}/server/status"

    @property
    def round(self) -> str:
        return f"{ROOT}/{self.run}/round"

    def globals_chunk(self, sha256: str, index: int | str) -> str:
        return f"{ROOT}/{self.run}/globals/{sha256}/{index}"

    def status(self, device: str) -> str:
        return f"{ROOT}/{self.run}/devices/{device}/status"

    def progress(self, device: str) -> str:
        return f"{ROOT}/{self.run}/devices/{device}/progress"

    def update_chunk(self, device: str, round_: int | str, index: int | str) -> str:
        return f"{ROOT}/{self.run}/devices/{device}/update/{round_}/{index}"

    def ack(self, device: str) -> str:
        return f"{ROOT}/{self.run}/devices/{device}/ack"

    def device_of(self, topic: str) -> str | None:
        """The device a topic belongs to, or None."""
        parts = topic.split("/")
        return parts[3] if parts[:3] == [ROOT, self.run, "devices"] and len(parts) > 4 else None

    def update_of(self, topic: str) -> tuple[str, str] | None:
        """The device and the round that an update chunk's topic names, or None if it is not one's topic."""
        parts = topic.split("/")
        return (parts[3], parts[5]) if self.device_of(topic) and parts[4] == "update" and len(parts) == 7 else None

    def globals_of(self, topic: str) -> str | None:
        """The SHA-256 that a global blob's topic names, or None if it is not one's topic."""
        parts = topic.split("/")
        return parts[3] if parts[:3] == [ROOT, self.run, "globals"] and len(parts) == 5 else None
