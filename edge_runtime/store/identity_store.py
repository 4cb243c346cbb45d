"""The identity that the daemon has renewed itself (see `edge_runtime.daemon.renewal`).

STATE/identity.pem    key, certificate and CA; what the daemon uses if it may renew them
STATE/next.key        the key of a request that is not answered yet
"""

from __future__ import annotations

from pathlib import Path

from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError
from fedfmsl.transport.identity import Identity, pem_blocks, read_identity


class IdentityStore:
    def __init__(self, state: Path) -> None:
        self.path = state / "identity.pem"
        self.next_key = state / "next.key"

    def newest(self, configured: Path | None) -> Path | None:
        """The `configured` identity, or the renewed one if that is of the same name and CA and was issued later. Raises
        ConfigError if the configured one cannot be used."""
        if configured is None or not (renewed := self._renewed()) or not renewed.valid:
            return configured
        known = read_identity(configured)
        same = (known.name, known.authorities) == (renewed.name, renewed.authorities)
        return self.path if same and known.valid and renewed.valid >= known.valid else configured

    def adopt(self, configured: Path) -> Path:
        """Makes STATE/identity.pem the newest identity, and returns its path, which stays the same after a renewal.
        Returns `configured` if that has no key. Raises ConfigError as `newest` does, OSError on a full disk."""
        newest = self.newest(configured) or configured
        if newest != self.path and read_identity(newest).name is not None:
            blocks = pem_blocks(newest.read_text("utf-8", errors="replace"))
            self.write("".join(f"{block}\n" for _, block in blocks))
            self.next_key.unlink(missing_ok=True)  # a thief of the former key may have it, too
        return self.path if read_identity(newest).name is not None else configured

    def write(self, pem: str) -> None:
        write_atomically(self.path, pem.encode(), durable=True, private=True)

    def _renewed(self) -> Identity | None:
        """None if there is none, or if this user may not read it."""
        try:
            return read_identity(self.path) if self.path.is_file() else None
        except (OSError, ConfigError):
            return None
