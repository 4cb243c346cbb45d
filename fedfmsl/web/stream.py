"""Live updates of a page by server-sent events.

Each event is a JSON object: the HTML of elements by their id, of those that have changed. `static/live.js` puts them
into the page. A stream that is broken begins again with all elements.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

SECONDS = 1.0  # between two updates
KEEP_ALIVE_SECONDS = 15.0  # between two messages, so that proxies keep the connection

# Returns the HTML of the page's live elements by id.
Elements = Callable[[], Mapping[str, str]]


def stream(elements: Elements, seconds: float = SECONDS) -> StreamingResponse:
    """Calls `elements` in another thread, at most every `seconds`."""
    headers = {"X-Accel-Buffering": "no"}  # nginx would collect events
    return StreamingResponse(_events(elements, seconds), media_type="text/event-stream", headers=headers)


async def _events(elements: Elements, seconds: float) -> AsyncIterator[str]:
    yield "retry: 2000\n\n"
    sent: Mapping[str, str] = {}
    last = time.monotonic()
    while True:
        current = await run_in_threadpool(elements)
        changed = {key: html for key, html in current.items() if sent.get(key) != html}
        if changed:
            sent, last = dict(current), time.monotonic()
            yield f"data: {json.dumps(changed)}\n\n"
        elif time.monotonic() - last > KEEP_ALIVE_SECONDS:
            last = time.monotonic()
            yield ": \n\n"
        await asyncio.sleep(seconds)
