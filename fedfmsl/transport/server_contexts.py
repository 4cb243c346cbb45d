"""The TLS context of a server that lasts: changed files (a revocation, a renewed certificate) count at once."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from fedfmsl.errors import ConfigError
from fedfmsl.transport.identity import read_identity


class ServerContexts:
    def __init__(
        self,
        identity: Path,
        revoked: Path | None,
        warn: Callable[[str], None],
        clients: ssl.VerifyMode = ssl.CERT_REQUIRED,
    ) -> None:
        """`revoked`: the revocation list. `warn` is called with a line if changed files are invalid. `clients`: whose
        certificates it asks for, as `Identity.server_context`. Raises ConfigError if the files are invalid."""
        self._identity, self._revoked, self._warn, self._clients = identity, revoked, warn, clients
        try:
            self._stamps = self._stamps_now()
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be read ({error.strerror}); check the path") from error
        self._context = self._read()

    def current(self) -> ssl.SSLContext:
        """For new connections. The earlier one as long as changed files are missing or invalid."""
        try:
            stamps = self._stamps_now()
        except OSError:
            return self._context
        if stamps != self._stamps:
            self._stamps = stamps
            try:
                self._context = self._read()
            except ConfigError as error:
                self._warn(f"still using the earlier certificate and revocation list: {error}")
        return self._context

    def _stamps_now(self) -> list[tuple[int, int]]:
        found = [path.stat() for path in (self._identity, self._revoked) if path]
        return [(each.st_mtime_ns, each.st_ino) for each in found]

    def _read(self) -> ssl.SSLContext:
        return read_identity(self._identity).server_context(self._revoked, self._clients)


def revocation_list_beside(identity: Path) -> Path | None:
    """The list of devices.provision in the folder of `identity`, or in the broker's kit there."""
    places = [identity.parent / "revoked.crl", identity.parent / "broker" / "revoked.crl"]
    return next((path for path in places if path.is_file()), None)
