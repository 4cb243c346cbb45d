"""The MQTT topics of a run (MQTT 3.1.1). A payload is a message of `fedfmsl.protocol.messages` or a chunk."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedfmsl.errors import ConfigError

ROOT = "fedfmsl"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a run or a device
MAX_NUMBER = 2**31  # highest round number
_NAME, _SHA256, _NUMBER = (re.compile(pattern) for pattern in (NAME, "[0-9a-f]{64}", "0|[1-9][0-9]{0,9}"))


def check_name(kind: str, name: str) -> str:
    """The name of a run or device (`kind`), for use in topics. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{kind} name {name!r} is invalid: use 1–64 letters, digits, '.', '_' or '-', the first a letter or digit"
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

    def health(self, device: str) -> str:
        return f"{ROOT}/{self.run}/devices/{device}/health"

    def prediction(self, device: str) -> str:
        return f"{ROOT}/{self.run}/devices/{device}/prediction"

    def prediction_status(self, device: str) -> str:
        """Retained: whether `predict --publish` runs for this device."""
        return f"{ROOT}/{self.run}/devices/{device}/prediction/status"

    def update_chunk(self, device: str, round_: int | str, index: int | str) -> str:
        return f"{ROOT}/{self.run}/devices/{device}/update/{round_}/{index}"

    def ack(self, device: str) -> str:
        return f"{ROOT}/{self.run}/devices/{device}/ack"

    def device_of(self, topic: str) -> str | None:
        """The device that a topic belongs to, or None."""
        parts = topic.split("/")
        known = parts[:3] == [ROOT, self.run, "devices"] and len(parts) > 4
        return parts[3] if known and _NAME.fullmatch(parts[3]) else None

    def update_of(self, topic: str) -> tuple[str, int] | None:
        """Device and round of the topic of an update chunk; None for other topics."""
        device, parts = self.device_of(topic), topic.split("/")
        if device is None or parts[4] != "update" or len(parts) != 7:
            return None
        round_, index = (int(part) if _NUMBER.fullmatch(part) else MAX_NUMBER + 1 for part in parts[5:])
        return (device, round_) if max(round_, index) <= MAX_NUMBER else None

    def globals_of(self, topic: str) -> str | None:
        """SHA-256 of the topic of a chunk of globals; None for other topics."""
        parts = topic.split("/")
        known = parts[:3] == [ROOT, self.run, "globals"] and len(parts) == 5
        return parts[3] if known and _SHA256.fullmatch(parts[3]) else None
