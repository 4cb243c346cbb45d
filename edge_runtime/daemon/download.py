"""The bundle from the run's server: announced over MQTT, fetched over HTTP(S), resumed, verified before use."""

from __future__ import annotations

import http.client
import math
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedfmsl.common.log import log
from fedfmsl.errors import BundleError, MessageError
from fedfmsl.protocol.bundle import MANIFEST, MAX_MANIFEST_BYTES, Bundle, file_sha256
from fedfmsl.protocol.messages import ServerStatus, parse
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.identity import client_context, explain, read_identity
from fedfmsl.transport.link import Link, Received

SERVER_SECONDS = 60
LOOK_SECONDS = 1.0
ASK_SECONDS = 5.0
HTTP_SECONDS = 30
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)  # between attempts that bring nothing: a server's restart, a cut line
BLOCK = 1 << 18


Beat = Callable[[], None]  # called again and again while something takes long


def find_server(link: Link, topics: Topics, heartbeat: Beat = lambda: None) -> ServerStatus:
    """The status of the run's server, for which it waits as long as it takes; after a minute it says so."""
    status = hear_server(link, topics, SERVER_SECONDS, heartbeat)
    if status is None:
        log.info(f"no server of run {topics.run!r} yet; is it started, is --run right? waiting for it")
        status = hear_server(link, topics, math.inf, heartbeat)
    assert status is not None
    return status


def hear_server(link: Link, topics: Topics, seconds: float, heartbeat: Beat = lambda: None) -> ServerStatus | None:
    """The status of the run's server, if it is online within so many seconds."""
    patience, asked = time.monotonic() + seconds, -math.inf
    while time.monotonic() < patience:
        if time.monotonic() > asked + ASK_SECONDS:  # again and again: amqtt can lose what comes while one subscribes
            asked = time.monotonic()
            link.subscribe(topics.server_status)
        event = link.next_event(LOOK_SECONDS)
        heartbeat()
        if isinstance(event, Received) and event.topic == topics.server_status and event.payload:
            try:
                status = parse(ServerStatus, event.payload)
            except MessageError:
                continue
            if status.online:
                return status
    return None


def fetch_bundle(
    server: ServerStatus, folder: Path, identity: Path | None = None, heartbeat: Beat = lambda: None
) -> Bundle:
    """The announced bundle, in a subfolder of `folder` named by its SHA-256; files already there are not fetched again.

    Raises BundleError if it cannot be fetched, or what comes is not what was announced.
    """
    bundle = fetch_manifest(server, folder, identity)
    tls = client_context(read_identity(identity) if identity else None)
    for name, entry in bundle.manifest.files.items():
        _fetch(_File(f"{server.bundle_url}/{name}", bundle.path(name), entry.sha256, entry.size), tls, heartbeat)
    return bundle


def fetch_manifest(server: ServerStatus, folder: Path, identity: Path | None = None) -> Bundle:
    """The announced bundle, of which only the manifest is there. Raises BundleError as `fetch_bundle` does."""
    root = folder / server.bundle
    if not server.bundle_url:
        raise BundleError("the server does not serve its bundle; start it with --serve HOST:PORT, or give --bundle")
    root.mkdir(parents=True, exist_ok=True)
    tls = client_context(read_identity(identity) if identity else None)
    _fetch(_File(f"{server.bundle_url}/{MANIFEST}", root / MANIFEST, server.bundle, None), tls)
    return Bundle.load(root)


@dataclass(frozen=True)
class _File:
    url: str
    path: Path
    sha256: str
    size: int | None  # bytes; of the manifest nobody has said it

    @property
    def part(self) -> Path:
        """What has come of it, after whatever way to be cut off."""
        return self.path.with_name(self.path.name + ".part")

    @property
    def have(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    @property
    def limit(self) -> int:
        return MAX_MANIFEST_BYTES if self.size is None else self.size


def _fetch(file: _File, tls: ssl.SSLContext, heartbeat: Beat = lambda: None) -> None:
    if file.path.is_file() and file_sha256(file.path) == file.sha256:
        return
    if file.have > file.limit:
        file.part.unlink()
    log.info(f"fetching {file.path.name}" + (f" from byte {file.have}" if file.have else ""))
    _resume(file, tls, heartbeat)
    if file_sha256(file.part) != file.sha256:
        file.part.unlink()
        raise BundleError(f"{file.url} does not have the announced SHA-256; what came was thrown away")
    file.part.replace(file.path)


def _resume(file: _File, tls: ssl.SSLContext, heartbeat: Beat) -> None:
    """Fetches what is missing, going on where the connection was cut as long as every attempt or the next few bring
    something. Raises BundleError if they do not."""
    waits = list(RETRY_SECONDS)
    while file.size is None or file.have < file.size or not file.part.is_file():
        before = file.have
        try:
            return _receive(file, tls, heartbeat)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing is missing of the part we have
                return None
            raise BundleError(f"cannot fetch {file.url}: HTTP {error.code}") from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            cause = getattr(error, "reason", error) if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):  # waiting mends nothing
                raise BundleError(f"cannot fetch {file.url}: {explain(cause)}") from error
            if file.have > before:
                waits = list(RETRY_SECONDS)
            if not waits:
                # uvicorn closes without a word on who has no certificate, or another fleet's
                tls_hint = ", with the fleet's --identity" if file.url.startswith("https:") else ""
                raise BundleError(f"cannot fetch {file.url}: {cause}; start again to resume{tls_hint}") from error
            time.sleep(waits.pop(0))
        except (OSError, ValueError) as error:  # this device's disk, or no address
            raise BundleError(f"cannot fetch {file.url}: {error}; start again to resume") from error
    return None


def _receive(file: _File, tls: ssl.SSLContext, heartbeat: Beat) -> None:
    """One request. If-Range: of a file that has changed meanwhile the whole comes (200), never the rest (206)."""
    headers = {"Range": f"bytes={file.have}-", "If-Range": f'"{file.sha256}"'} if file.have else {}
    request = urllib.request.Request(file.url, headers=headers)
    with urllib.request.urlopen(request, timeout=HTTP_SECONDS, context=tls) as response:
        resumed = response.status == 206
        left = file.limit - (file.have if resumed else 0) + 1  # one more than there should be tells that there is more
        with file.part.open("ab" if resumed else "wb") as out:
            while left and (block := response.read(min(BLOCK, left))):
                out.write(block)
                heartbeat()
                left -= len(block)
        if left and response.length:
            raise ConnectionError(f"cut off {response.length} bytes before its end")
