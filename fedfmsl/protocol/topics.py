"""The MQTT topics of a run (MQTT 3.1.1). A payload is a message of `fedfmsl.protocol.messages` or a chunk."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

from fedfmsl.errors import ConfigError

ROOT = "fedfmsl"  # the default of the topic prefix
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # of a run or a device
PREFIX = r"[A-Za-z0-9._-]{1,64}(?:/[A-Za-z0-9._-]{1,64}){0,7}"  # the first levels of all topics
MAX_NUMBER = 2**31  # highest round number
MAX_CLIENT_ID = 100  # characters; AWS IoT and others allow 128
_NAME, _PREFIX, _SHA256, _NUMBER = (
    re.compile(pattern) for pattern in (NAME, PREFIX, "[0-9a-f]{64}", "0|[1-9][0-9]{0,9}")
)


def check_name(kind: str, name: str) -> str:
    """The name of a run or device (`kind`), for use in topics. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{kind} name {name!r} is invalid: use 1–64 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    return name


def check_prefix(prefix: str) -> str:
    """The prefix of all topics. Raises ConfigError."""
    if not _PREFIX.fullmatch(prefix):
        raise ConfigError(
            f"topic prefix {prefix!r} is invalid: write letters, digits, '.', '_' or '-', like tenant-7/fedfmsl"
        )
    return prefix


def discovery_topic(prefix: str, run: str, device: str) -> str:
    """Where a device announces itself to Home Assistant."""
    return f"{prefix}/device/{run}/{device}/config"


@dataclass(frozen=True)
class Topics:
    """`prefix`: the first levels of all topics. A broker with several tenants gives each of them its own."""

    run: str
    prefix: str = ROOT

    def __post_init__(self) -> None:
        check_name("run", self.run)
        check_prefix(self.prefix)

    @property
    def root(self) -> str:
        """The levels that all topics of the run begin with."""
        return f"{self.prefix}/{self.run}"

    def client_id(self, *parts: str) -> str:
        """A client id with these parts, unique if they are, of at most MAX_CLIENT_ID characters."""
        text = "-".join((self.prefix.replace("/", "-"), self.run, *parts))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return text if len(text) <= MAX_CLIENT_ID else f"{text[: MAX_CLIENT_ID - 17]}-{digest}"

    @property
    def server_status(self) -> str:
        return f"{self.root}/server/status"

    @property
    def server_check(self) -> str:
        """The server sends itself messages here, to learn which ones the broker takes."""
        return f"{self.root}/server/check"

    def check(self, device: str) -> str:
        """The same for a device."""
        return f"{self.root}/devices/{device}/check"

    @property
    def round(self) -> str:
        return f"{self.root}/round"

    def globals_chunk(self, sha256: str, index: int | str) -> str:
        return f"{self.root}/globals/{sha256}/{index}"

    def status(self, device: str) -> str:
        return f"{self.root}/devices/{device}/status"

    def progress(self, device: str) -> str:
        return f"{self.root}/devices/{device}/progress"

    def health(self, device: str) -> str:
        return f"{self.root}/devices/{device}/health"

    def prediction(self, device: str) -> str:
        return f"{self.root}/devices/{device}/prediction"

    def prediction_status(self, device: str) -> str:
        """Retained: whether `predict --publish` runs for this device."""
        return f"{self.root}/devices/{device}/prediction/status"

    def update_chunk(self, device: str, round_: int | str, index: int | str) -> str:
        return f"{self.root}/devices/{device}/update/{round_}/{index}"

    def ack(self, device: str) -> str:
        return f"{self.root}/devices/{device}/ack"

    def device_of(self, topic: str) -> str | None:
        """The device that a topic belongs to, or None."""
        parts = self._below_root(topic)
        known = len(parts) > 2 and parts[0] == "devices"
        return parts[1] if known and _NAME.fullmatch(parts[1]) else None

    def update_of(self, topic: str) -> tuple[str, int] | None:
        """Device and round of the topic of an update chunk; None for other topics."""
        device, parts = self.device_of(topic), self._below_root(topic)
        if device is None or parts[2] != "update" or len(parts) != 5:
            return None
        round_, index = (int(part) if _NUMBER.fullmatch(part) else MAX_NUMBER + 1 for part in parts[3:])
        return (device, round_) if max(round_, index) <= MAX_NUMBER else None

    def globals_of(self, topic: str) -> str | None:
        """SHA-256 of the topic of a chunk of globals; None for other topics."""
        parts = self._below_root(topic)
        known = len(parts) == 3 and parts[0] == "globals"
        return parts[1] if known and _SHA256.fullmatch(parts[1]) else None

    def has(self, topic: str) -> bool:
        """Whether a topic is one of this run. Another tenant's prefix may begin with this run's root."""
        device = self.device_of(topic)
        if device is None:
            return topic in (self.server_status, self.server_check, self.round) or self.globals_of(topic) is not None
        own = (self.status, self.progress, self.health, self.prediction, self.prediction_status, self.ack, self.check)
        # a device may write anything below its updates
        return topic in [each(device) for each in own] or topic.startswith(f"{self.root}/devices/{device}/update/")

    def _below_root(self, topic: str) -> tuple[str, ...]:
        """The levels of a topic of the run without `root`; none for another topic."""
        return _levels(f"{self.root}/", topic)


@lru_cache(maxsize=64)  # a server asks several times for the parts of each topic
def _levels(root: str, topic: str) -> tuple[str, ...]:
    return tuple(topic[len(root) :].split("/")) if topic.startswith(root) else ()
