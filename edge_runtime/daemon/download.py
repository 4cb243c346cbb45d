"""The run's bundle: announced over MQTT, fetched over HTTP(S), resumed after an interruption, verified before use."""

from __future__ import annotations

import contextlib
import http.client
import logging
import math
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fedfmsl.common.backoff import Backoff, Timeout
from fedfmsl.common.files import FULL
from fedfmsl.common.settings import without_secrets
from fedfmsl.errors import BrokerError, BundleError, MessageError
from fedfmsl.protocol.bundle import MANIFEST, MAX_MANIFEST_BYTES, Bundle, file_sha256
from fedfmsl.protocol.messages import Round, ServerStatus, Stage, parse
from fedfmsl.protocol.topics import Topics
from fedfmsl.transport.identity import client_context
from fedfmsl.transport.link import Link, Received, SubscriptionRefused
from fedfmsl.transport.tls_errors import explain

logger = logging.getLogger(__name__)

REPORT_SECONDS = 60.0  # without a server, until that is logged
POLL_SECONDS = 1.0
RESUBSCRIBE = Backoff(first=5.0, longest=300.0)  # amqtt can lose a message during a subscription
HTTP_SECONDS = 30
BUSY_SECONDS = 5.0
RETRY_DELAYS = tuple(Backoff(first=1.0, longest=16.0).delay(attempt) for attempt in range(5))
BLOCK_BYTES = 1 << 18

Heartbeat = Callable[[], None]  # called at least once a second or once per block


def no_heartbeat() -> None:
    pass


def _waits_on(_: ServerStatus, __: Round) -> bool:
    return False


AtEnd = Callable[[ServerStatus, Round], bool]  # whether to go on with the run that has finished


def wait_for_server(
    link: Link,
    topics: Topics,
    heartbeat: Heartbeat = no_heartbeat,
    report_seconds: float = REPORT_SECONDS,
    finished: AtEnd = _waits_on,
) -> ServerStatus:
    """The status of the run's server. Waits without limit, and logs that after `report_seconds`. `finished` is called
    once with the last status and the end of each session that the broker has; if it returns True, that is the status.
    """
    ended: dict[str, bool] = {}  # by session

    def end(server: ServerStatus, round_: Round) -> bool:
        if round_.session not in ended:
            ended[round_.session] = finished(server, round_)
        return ended[round_.session]

    status = receive_server_status(link, topics, report_seconds, heartbeat, end)
    if status is None:
        if not ended:
            about = "Check that it is started and that --run is right"
            logger.info(f"no server of run {topics.run!r} yet; waiting. {about}")
        status = receive_server_status(link, topics, math.inf, heartbeat, end)
    assert status is not None
    return status


def receive_server_status(
    link: Link,
    topics: Topics,
    timeout: float,
    heartbeat: Heartbeat = no_heartbeat,
    finished: AtEnd = _waits_on,
) -> ServerStatus | None:
    """The status of the run's server if it is online within `timeout` seconds. `finished` as for `wait_for_server`,
    but it may be called several times."""
    deadline, again = time.monotonic() + timeout, Timeout(RESUBSCRIBE, since=-math.inf)
    offline: ServerStatus | None = None
    end: Round | None = None
    while time.monotonic() < deadline:
        if again.expired():
            link.subscribe(topics.server_status)
            link.subscribe(topics.round)
        event = link.next_event(POLL_SECONDS)
        heartbeat()
        if isinstance(event, SubscriptionRefused):
            raise BrokerError(event.error)
        if isinstance(event, Received) and event.topic == topics.round and event.payload:
            with contextlib.suppress(MessageError):
                round_ = parse(Round, event.payload)
                end = round_ if round_.stage is Stage.FINISHED else None
        if isinstance(event, Received) and event.topic == topics.server_status and event.payload:
            try:
                status = parse(ServerStatus, event.payload)
            except MessageError:
                continue
            if status.online:
                return status
            offline = status
        if offline is not None and end is not None and offline.session == end.session and finished(offline, end):
            return offline
    return None


def stored_bundle(folder: Path, sha256: str) -> Bundle | None:
    """The bundle with this SHA-256 below `folder` if all of its files were downloaded; they are not verified."""
    with contextlib.suppress(BundleError):
        bundle = Bundle.load(folder / sha256)
        files = ((bundle.path(name), entry.size) for name, entry in bundle.manifest.files.items())
        if bundle.sha256 == sha256 and all(path.is_file() and path.stat().st_size == size for path, size in files):
            return bundle
    return None


def fetch_bundle(
    server: ServerStatus,
    folder: Path,
    identity: Path | None = None,
    heartbeat: Heartbeat = no_heartbeat,
    retry_delays: Sequence[float] = RETRY_DELAYS,
    block_bytes: int = BLOCK_BYTES,
    busy_seconds: float = BUSY_SECONDS,
) -> Bundle:
    """The announced bundle, in a subfolder of `folder` named by its SHA-256. Files that are already there are kept.

    `retry_delays` are the seconds before each further attempt while attempts receive nothing. A server that is busy is
    asked again every `busy_seconds`, without limit. Raises BundleError if the bundle cannot be fetched or differs from
    the announced one.
    """
    http_client = _HttpClient(client_context(identity), heartbeat, retry_delays, block_bytes, busy_seconds)
    bundle = _fetch_manifest(server, folder, http_client)
    for name, entry in bundle.manifest.files.items():
        http_client.fetch(_File(f"{server.bundle_url}/{name}", bundle.path(name), entry.sha256, entry.size))
    return bundle


def fetch_manifest(server: ServerStatus, folder: Path, identity: Path | None = None) -> Bundle:
    """The announced bundle with its manifest only. Raises BundleError as `fetch_bundle` does."""
    return _fetch_manifest(server, folder, _HttpClient(client_context(identity), busy_waits=0))


def _fetch_manifest(server: ServerStatus, folder: Path, http_client: _HttpClient) -> Bundle:
    root = folder / server.bundle
    if not server.bundle_url:
        raise BundleError("the server does not serve its bundle; start it with --serve HOST:PORT, or give --bundle")
    root.mkdir(parents=True, exist_ok=True)
    http_client.fetch(_File(f"{server.bundle_url}/{MANIFEST}", root / MANIFEST, server.bundle, None))
    return Bundle.load(root)


@dataclass(frozen=True)
class _File:
    """`size` in bytes; None for the manifest, whose size is not announced."""

    url: str
    path: Path
    sha256: str
    size: int | None

    @property
    def part(self) -> Path:
        """The file of the bytes received so far. It survives a restart."""
        return self.path.with_name(self.path.name + ".part")

    @property
    def received(self) -> int:
        """Bytes received so far."""
        return self.part.stat().st_size if self.part.is_file() else 0

    @property
    def max_bytes(self) -> int:
        return MAX_MANIFEST_BYTES if self.size is None else self.size


@dataclass(frozen=True)
class _HttpClient:
    tls: ssl.SSLContext
    heartbeat: Heartbeat = no_heartbeat
    retry_delays: Sequence[float] = RETRY_DELAYS
    block_bytes: int = BLOCK_BYTES
    busy_seconds: float = BUSY_SECONDS  # between attempts while the server serves as many devices as it can
    busy_waits: float = math.inf

    def fetch(self, file: _File) -> None:
        """Raises BundleError if the file cannot be fetched or does not have its SHA-256."""
        if file.path.is_file() and file_sha256(file.path) == file.sha256:
            return
        if file.received > file.max_bytes:
            file.part.unlink()
        logger.info(f"fetching {file.path.name}" + (f" from byte {file.received}" if file.received else ""))
        self._resume(file)
        if file_sha256(file.part) != file.sha256:
            file.part.unlink()
            raise BundleError(
                f"{file.url} does not have the announced SHA-256{_proxy_hint(file.url)}; the received bytes are deleted"
            )
        file.part.replace(file.path)

    def _resume(self, file: _File) -> None:
        """Receives what is missing, over several connections if necessary. An attempt that receives bytes resets the
        retries. Raises BundleError if no retry is left."""
        delays, waits = list(self.retry_delays), 0
        while file.size is None or file.received < file.size or not file.part.is_file():
            before = file.received
            try:
                self._receive(file)
                return
            except urllib.error.HTTPError as error:
                if error.code == 416:  # the part is complete
                    return
                if error.code in (429, 503) and "Retry-After" in error.headers and waits < self.busy_waits:
                    if not waits:
                        logger.info(f"the server is busy (HTTP {error.code}); waiting to fetch {file.path.name}")
                    waits += 1
                    self._wait(self.busy_seconds)
                    continue
                raise BundleError(
                    f"cannot fetch {file.url}: HTTP {error.code}{_proxy_hint(file.url)}; check the server, or pass "
                    "--bundle"
                ) from error
            except (
                urllib.error.URLError,
                http.client.HTTPException,
                ConnectionError,
                TimeoutError,
                ssl.SSLError,
            ) as error:
                cause = getattr(error, "reason", error) if isinstance(error, urllib.error.URLError) else error
                was_cut = isinstance(cause, ssl.SSLEOFError)
                if isinstance(cause, ssl.SSLError) and not was_cut:
                    raise BundleError(f"cannot fetch {file.url}: {explain(cause)}{_proxy_hint(file.url)}") from error
                if file.received > before:
                    delays = list(self.retry_delays)
                if not delays:
                    tls_hint = ", with the fleet's --identity" if file.url.startswith("https:") else ""
                    raise BundleError(
                        f"cannot fetch {file.url}: {cause}{_proxy_hint(file.url)}; start again to resume{tls_hint}"
                    ) from error
                self._wait(delays.pop(0))
            except (OSError, ValueError) as error:  # this device's disk, or an invalid address
                if getattr(error, "errno", None) in FULL:
                    missing = f"{((file.size or 0) - file.received) / 1e6:.1f} MB more for {file.path.name}"
                    raise BundleError(
                        f"the disk of {file.path.parent} is full: the bundle needs {missing}; free some disk space, "
                        "then start again to resume"
                    ) from error
                raise BundleError(f"cannot fetch {file.url}: {error}; start again to resume") from error

    def _wait(self, seconds: float) -> None:
        self.heartbeat()
        time.sleep(seconds)

    def _receive(self, file: _File) -> None:
        """Sends one request. With If-Range the server sends the rest (206) if the file is the announced one, otherwise
        the whole file (200)."""
        headers = {"Range": f"bytes={file.received}-", "If-Range": f'"{file.sha256}"'} if file.received else {}
        request = urllib.request.Request(file.url, headers=headers)
        with urllib.request.urlopen(request, timeout=HTTP_SECONDS, context=self.tls) as response:
            resumed = response.status == 206
            left = file.max_bytes - (file.received if resumed else 0) + 1  # one more byte shows that there are too many
            with file.part.open("ab" if resumed else "wb") as out:
                while left and (block := response.read(min(self.block_bytes, left))):
                    out.write(block)
                    self.heartbeat()
                    left -= len(block)
            if left and response.length:
                raise ConnectionError(f"cut off {response.length} bytes before its end")


def _proxy_hint(url: str) -> str:
    """Names the proxy of the environment that a request for `url` goes through, if there is one."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    return (
        f" (through the proxy {without_secrets(proxy)} of {parts.scheme}_proxy; without it: no_proxy={parts.hostname})"
    )
