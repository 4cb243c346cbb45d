"""The bundle from the run's server: announced over MQTT, fetched over HTTP, verified before use, resumed if cut off."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from protocol.bundle import MANIFEST, MAX_MANIFEST_BYTES, Bundle, file_sha256
from protocol.errors import BundleError, MessageError, RunError
from protocol.messages import ServerStatus, parse
from protocol.topics import Topics
from shell.cli import console
from shell.link import Link, Received

SERVER_SECONDS = 60
HTTP_SECONDS = 30
BLOCK = 1 << 18


def find_server(link: Link, topics: Topics) -> ServerStatus:
    """The status of the run's server. Raises RunError if none shows itself within a minute."""
    link.subscribe(topics.server_status)
    end = time.monotonic() + SERVER_SECONDS
    while (left := end - time.monotonic()) > 0:
        event = link.next_event(left)
        if isinstance(event, Received) and event.topic == topics.server_status and event.payload:
            try:
                status = parse(ServerStatus, event.payload)
            except MessageError:
                continue
            if status.online:
                return status
    raise RunError(f"no server of run {topics.run!r} within {SERVER_SECONDS} s; is it started, is --run right?")


def fetch_bundle(server: ServerStatus, folder: Path) -> Bundle:
    """The announced bundle, in a subfolder of `folder` named by its SHA-256; files already there are not fetched again.

    Raises BundleError if it cannot be fetched, or what comes is not what was announced.
    """
    root = folder / server.bundle
    if not server.bundle_url:
        raise BundleError("the server does not serve its bundle; start it with --serve HOST:PORT, or give --bundle")
    root.mkdir(parents=True, exist_ok=True)
    _fetch(f"{server.bundle_url}/{MANIFEST}", root / MANIFEST, server.bundle, MAX_MANIFEST_BYTES)
    bundle = Bundle(root)
    for name, entry in bundle.manifest.files.items():
        _fetch(f"{server.bundle_url}/{name}", bundle.path(name), entry.sha256, entry.size)
    return bundle


def _fetch(url: str, path: Path, sha256: str, most: int) -> None:
    """Reads no further than `most` bytes of the file."""
    if path.is_file() and file_sha256(path) == sha256:
        return
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    console.print(f"fetching {path.name}" + (f" from byte {have}" if have else ""))
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with (
            urllib.request.urlopen(request, timeout=HTTP_SECONDS) as response,
            part.open("ab" if response.status == 206 else "wb") as file,
        ):
            left = most - file.tell()
            while left > 0 and (block := response.read(min(BLOCK, left))):
                file.write(block)
                left -= len(block)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is missing of the part we have
            raise BundleError(f"cannot fetch {url}: HTTP {error.code}") from error
    except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:
        raise BundleError(f"cannot fetch {url}: {error}; start again to resume") from error
    if file_sha256(part) != sha256:
        part.unlink()
        raise BundleError(f"{url} does not have the announced SHA-256; what came was thrown away")
    part.replace(path)
