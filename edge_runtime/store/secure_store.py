"""What a device must remember of secure sums: the seed of its secrets, and what it has already sent.

STATE/secure     the current execution of the protocol, and the vectors of the session that were opened
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedfmsl.common.files import write_atomically
from fedfmsl.protocol.messages import Level, Name, Number, Session, Sha256


class MaskedVector(BaseModel):
    """A vector `kind` that was masked in round `round` among `members`, at `level` if it is an expert. `survivors`:
    with whom it was opened, or nobody. `least`: fewer survivors would not add the whole noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    level: Level = 0
    round: Number
    members: tuple[Name, ...]
    least: Number = 0
    survivors: tuple[Name, ...] = ()


class SecureRecord(BaseModel):
    """`level`: at which the device trains. `seed`: of the secrets, in hexadecimal. `roster`: digest of the roster for
    which shares were made. `vectors`: by index. `opened`: the kinds of vectors whose masks this device has helped to
    remove in this session."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    session: Session
    keys_round: Number
    level: Level = 0
    seed: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    roster: Sha256 = ""
    vectors: dict[int, MaskedVector] = {}
    opened: tuple[str, ...] = ()


class NoKeysError(Exception):
    """This device has no keys for a round: they were sent before it joined, or its state directory is new."""


class SecureStore:
    def __init__(self, state: Path) -> None:
        self.path = state / "secure"

    def read(self) -> SecureRecord | None:
        """None before the first secure sums, or if the file is damaged."""
        try:
            return SecureRecord.model_validate_json(self.path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write(self, record: SecureRecord) -> None:
        write_atomically(self.path, record.model_dump_json().encode(), durable=True)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
