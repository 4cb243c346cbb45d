"""Starts the process that serves the bundle over HTTP(S) (`bundle_process`). The bundle is too large for a broker."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

from fedfmsl.errors import BundleError
from fedfmsl.protocol.bundle import MANIFEST, Bundle
from fedfmsl.transport.address import require_loopback
from fedfmsl.transport.listening import parse_listen
from fedfmsl.transport.server_contexts import ServerContexts, revocation_list_beside
from trainer_server.service.bundle_process import Job
from trainer_server.service.child_process import RESTART_SECONDS, ChildProcess

logger = logging.getLogger(__name__)


class BundleServer:
    """Serves a bundle's files at `url` in another process until `close`. A process that ends is started again."""

    def __init__(
        self,
        root: Path,
        address: str,
        identity: Path | None = None,
        insecure: bool = False,
        revoked: Path | None = None,
        allowed: frozenset[str] | None = None,
        restart_seconds: float = RESTART_SECONDS,
    ) -> None:
        """`address` is HOST:PORT as clients reach it. With an identity: HTTPS, for clients with a certificate of the
        same CA that is not in the list `revoked`, and with a name of `allowed`. Default of `revoked`: the list of
        devices.provision beside the identity, if it is there.

        Without an identity the address must be a loopback address, unless `insecure`. Raises ConfigError if address or
        identity is invalid, RunError if the server cannot listen there.
        """
        host, port = parse_listen(address)
        if identity is None and not insecure:
            require_loopback(f"the bundle from --serve {address}", host, "pass the server's --identity")
        if identity:
            revoked = revoked or revocation_list_beside(identity)
            ServerContexts(identity, revoked, logger.warning)  # raises ConfigError
            if revoked is None:
                logger.warning(
                    "the bundle's server has no revocation list, so it serves revoked devices; give --revoked"
                )
        self.url = f"{'https' if identity else 'http'}://{address}/bundle"
        job = Job(
            host,
            port,
            _files(Bundle.load(root)),
            str(identity.absolute()) if identity else None,
            str(revoked.absolute()) if revoked else None,
            sorted(allowed) if allowed is not None and identity else None,
        )
        self._child = ChildProcess(
            "trainer_server.service.bundle_process",
            json.dumps(asdict(job)),
            "the bundle's server",
            restart_seconds,
        )

    @property
    def pid(self) -> int:
        """Of the process that serves now."""
        return self._child.pid

    def close(self) -> None:
        self._child.close()


def _files(bundle: Bundle) -> dict[str, tuple[str, str]]:
    """Absolute path and SHA-256 of the manifest and of the files that it names, by name."""
    digests = {MANIFEST: bundle.sha256} | {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    found = {}
    for name, sha256 in digests.items():
        with contextlib.suppress(BundleError):  # the manifest names a file outside of the bundle
            found[name] = (str(bundle.path(name).absolute()), sha256)
    return found
