"""Serves the bundle over HTTP(S), with Range and ETag. It is too large for a broker."""

from __future__ import annotations

import errno
import socket
import threading
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedfmsl.errors import BundleError, ConfigError, RunError
from fedfmsl.protocol.bundle import MANIFEST, Bundle
from fedfmsl.transport.address import require_loopback
from fedfmsl.transport.identity import read_identity

START_SECONDS = 10


class BundleServer:
    """Serves a bundle's files at `url` in a thread until `close`."""

    def __init__(self, root: Path, address: str, identity: Path | None = None, insecure: bool = False) -> None:
        """`address` is HOST:PORT as clients reach it. If it is not this machine's, because of a container's network or
        address translation, the server listens on all addresses. With an identity: HTTPS, for clients with a certificate of the same CA.

        Without an identity the address must be a loopback address, unless `insecure`. Raises ConfigError if address or
        identity is invalid, RunError if the server cannot listen there.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ConfigError(f"--serve {address!r} is not HOST:PORT, for example fleet.example:8443")
        if identity is None and not insecure:
            require_loopback(f"the bundle from --serve {address}", host, "pass the server's --identity")
        self.url = f"{'https' if identity else 'http'}://{address}/bundle"
        config = uvicorn.Config(
            bundle_app(Bundle.load(root)), host=_own(host.strip("[]")), port=int(port), log_level="critical"
        )
        config.load()
        if identity:
            # uvicorn's own options need key and CA in separate files
            config.ssl = read_identity(identity).server_context()
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ended = threading.Event()
        self._thread.start()
        for _ in range(START_SECONDS * 20):
            if self._server.started or self._ended.wait(0.05):
                break
        if not self._server.started:
            raise RunError(f"cannot serve the bundle on {address}; is the port in use? choose another --serve")

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._server.run()
        except SystemExit:  # uvicorn exits if it cannot bind
            pass
        finally:
            self._ended.set()


def _own(host: str) -> str:
    """`host`, or "" for all addresses if this machine does not have it."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
    except OSError as error:
        return "" if error.errno == errno.EADDRNOTAVAIL else host
    return host


def bundle_app(bundle: Bundle) -> Starlette:
    """Serves the manifest and the files that it names. The ETag of each file is its SHA-256."""
    digests = {MANIFEST: bundle.sha256} | {name: entry.sha256 for name, entry in bundle.manifest.files.items()}

    async def serve(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in digests or not _exists(bundle, name):
            return PlainTextResponse("the bundle has no such file", status_code=404)
        etag = f'"{digests[name]}"'
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if known & {etag, "*"}:
            return Response(status_code=304, headers={"etag": etag})
        return FileResponse(bundle.path(name), headers={"etag": etag}, media_type="application/octet-stream")

    return Starlette(routes=[Route("/bundle/{name:path}", serve)])


def _exists(bundle: Bundle, name: str) -> bool:
    try:
        return bundle.path(name).is_file()
    except BundleError:  # the manifest names a file outside of the bundle
        return False
