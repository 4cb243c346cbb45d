"""HTTP of the bundle: one GET or HEAD per connection, with Range and ETag. The ETag of a file is its SHA-256."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, parse_headers
from pathlib import Path
from urllib.parse import unquote, urlsplit

HEAD_BYTES = 8192  # of a request
BLOCK_BYTES = 1 << 16
ROOT = "/bundle/"
RETRY_SECONDS = 10
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Served:
    """A file that may be fetched."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class Request:
    method: str
    name: str  # of a file; "" for a path that is none
    headers: Mapping[str, str]  # by name in lower case


@dataclass(frozen=True)
class Response:
    """`head` ends with the empty line. The body are `size` bytes of `path` from `start`, or `text`."""

    head: bytes
    path: Path | None = None
    start: int = 0
    size: int = 0
    text: bytes = b""

    def blocks(self) -> Iterator[bytes]:
        yield self.head + self.text
        if self.path is not None:
            with self.path.open("rb") as file:
                file.seek(self.start)
                left = self.size
                while left and (block := file.read(min(BLOCK_BYTES, left))):
                    left -= len(block)
                    yield block


def read_request(receive: Callable[[int], bytes]) -> Request:
    """`receive` returns the next bytes of a connection, at most as many as asked for. Raises ValueError if they are no
    request, or it is longer than HEAD_BYTES."""
    received = b""
    while b"\r\n\r\n" not in received:
        block = receive(HEAD_BYTES + 1 - len(received))
        received += block
        if not block or len(received) > HEAD_BYTES:
            raise ValueError("no request")
    first, _, rest = received.partition(b"\r\n")
    try:
        method, target, version = first.decode("ascii").split(" ")
        headers = {name.lower(): value for name, value in parse_headers(io.BytesIO(rest)).items()}
    except HTTPException as error:
        raise ValueError("its headers are invalid") from error
    if not version.startswith("HTTP/1."):
        raise ValueError("not HTTP/1")
    path = unquote(urlsplit(target).path)
    return Request(method, path.removeprefix(ROOT) if path.startswith(ROOT) else "", headers)


def respond(request: Request, files: Mapping[str, Served]) -> Response:
    """Only the files of `files` exist."""
    if request.method not in ("GET", "HEAD"):
        return refusal(HTTPStatus.METHOD_NOT_ALLOWED)
    served = files.get(request.name)
    if served is None or not served.path.is_file():
        return refusal(HTTPStatus.NOT_FOUND)
    etag, size = f'"{served.sha256}"', served.path.stat().st_size
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {etag, "*"}:
        return Response(_head(HTTPStatus.NOT_MODIFIED, etag=etag))
    wanted = _RANGE.fullmatch(request.headers.get("range", ""))
    if wanted is None or request.headers.get("if-range", etag) != etag:
        status, start, end, about = HTTPStatus.OK, 0, size, {}
    else:
        start, end = int(wanted[1]), min(int(wanted[2]) + 1 if wanted[2] else size, size)
        if start >= end:
            return refusal(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, content_range=f"bytes */{size}")
        status, about = HTTPStatus.PARTIAL_CONTENT, {"content_range": f"bytes {start}-{end - 1}/{size}"}
    head = _head(status, etag=etag, content_length=str(end - start), accept_ranges="bytes", **about)
    return Response(head, served.path if request.method == "GET" else None, start, end - start)


def refusal(status: HTTPStatus, **headers: str) -> Response:
    """A response without a file. 429 and 503 say when to try again."""
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["retry_after"] = str(RETRY_SECONDS)
    text = f"{status.phrase}\n".encode()
    return Response(_head(status, content_length=str(len(text)), **headers), text=text)


def _head(status: HTTPStatus, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if "etag" in headers:
        lines.append("content-type: application/octet-stream")
    return "\r\n".join([*lines, "", ""]).encode()
