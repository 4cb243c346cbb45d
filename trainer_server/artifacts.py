"""The bundle over HTTP, with Range and ETag: what is too large for a broker."""

from __future__ import annotations

import threading
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from protocol.errors import ConfigError, RunError

START_SECONDS = 10


class ArtifactServer:
    """Serves a bundle's files at `url` from a thread, until `close`."""

    def __init__(self, root: Path, address: str) -> None:
        """`address` is HOST:PORT. Raises ConfigError if it is neither, RunError if it cannot be served on."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ConfigError(f"--serve {address!r} is not HOST:PORT")
        self.url = f"http://{address}/bundle"
        app = Starlette(routes=[Mount("/bundle", StaticFiles(directory=root))])
        self._server = uvicorn.Server(uvicorn.Config(app, host=host, port=int(port), log_level="critical"))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ended = threading.Event()
        self._thread.start()
        for _ in range(START_SECONDS * 20):
            if self._server.started or self._ended.wait(0.05):
                break
        if not self._server.started:
            raise RunError(f"cannot serve the bundle on {address}; is the port taken? choose another --serve")

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._server.run()
        except SystemExit:  # uvicorn's way to say that it could not bind
            pass
        finally:
            self._ended.set()
