"""Live updates of a page by server-sent events.

Each event is a JSON object: the HTML of elements by their id, of those that have changed. `static/live.js` puts them
into the page. A stream that is broken begins again with all elements.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

SECONDS = 1.0  # between two updates
CLOSING_SECONDS = 0.2  # in which a waiting stream notices the end of its server
KEEP_ALIVE_SECONDS = 15.0  # between two messages, so that proxies keep the connection

# Returns the HTML of the page's live elements by id.
Elements = Callable[[], Mapping[str, str]]


def stream(elements: Elements, seconds: float = SECONDS) -> Response:
    """Calls `elements` in another thread, at most every `seconds`."""
    return _Stream(elements, seconds)


class _Stream(StreamingResponse):
    """Ends when the server of its application closes, after a last look, and when the session ends."""

    def __init__(self, elements: Elements, seconds: float) -> None:
        headers = {"X-Accel-Buffering": "no"}  # nginx would collect events
        super().__init__(self._events(elements, seconds), media_type="text/event-stream", headers=headers)
        self._closing = threading.Event()
        self._is_signed_in: Callable[[], bool] = lambda: True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        access, session, operator = scope["app"].state.access, scope["state"]["session"], scope.get("operator", "")
        self._closing = scope["app"].state.closing
        self._is_signed_in = lambda: access.session(session, operator) is not None
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:  # the server ends, and a client that reads nothing holds the stream
            if not self._closing.is_set():
                raise

    async def _events(self, elements: Elements, seconds: float) -> AsyncIterator[str]:
        yield "retry: 2000\n\n"
        sent: Mapping[str, str] = {}
        last = time.monotonic()
        while self._is_signed_in():
            is_last = self._closing.is_set()
            current = await run_in_threadpool(elements)
            changed = {key: html for key, html in current.items() if sent.get(key) != html}
            if changed:
                sent, last = dict(current), time.monotonic()
                yield f"data: {json.dumps(changed)}\n\n"
            elif time.monotonic() - last > KEEP_ALIVE_SECONDS:
                last = time.monotonic()
                yield ": \n\n"
            if is_last:
                return
            until = time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0 and not self._closing.is_set():
                await asyncio.sleep(min(left, CLOSING_SECONDS))
