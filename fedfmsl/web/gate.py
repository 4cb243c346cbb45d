"""The ASGI middleware before all pages: it checks host, session, rate, method, body and CSRF token, and adds security
headers. The form of a POST request is in `request.state.form`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedfmsl.web.access import Access

BODY_BYTES = 1 << 16
FIELDS = 1000  # of a form
FORM_SECONDS = 10.0  # for a form to arrive
FORM = "application/x-www-form-urlencoded"
SIGN_IN = "/sign-in"
STATIC = "/static/"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send forms without their origin
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
FAULT = "This page has a fault. The log of its process says more."
# Makes a response that says why a request is refused.
Refuse = Callable[[Request, int, str], Response]


class Gate:
    def __init__(self, app: ASGIApp, access: Access, refuse: Refuse) -> None:
        self._app = app
        self._access = access
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # "lifespan"; the server offers no WebSockets
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        sender = _Sender(send, is_static=request.url.path.startswith(STATIC))
        response = await self._check(request)
        try:
            await (response or self._app)(scope, receive, sender)
        except Exception:
            if not sender.has_started:
                await self._refuse(request, 500, FAULT)(scope, receive, sender)
            raise  # for the log

    async def _check(self, request: Request) -> Response | None:
        """A response if the request goes no further. Sets `session`, `csrf` and `form` of its state."""
        access, path = self._access, request.url.path
        cookie = request.cookies.get(access.cookie)
        session = access.session(cookie, request.scope.get("operator", ""))
        request.state.session, request.state.csrf, request.state.form = session, access.csrf(session), {}
        request.state.can_sign_out = access.is_signed_in(cookie)
        host = request.headers.get("host", "")
        if not access.is_host(host):
            return self._refuse(
                request, 400, "This page has another name. Use its IP address, or the name that it listens on."
            )
        address = request.client.host if request.client else ""
        if not access.requests.allows(address, time.monotonic()):
            return self._refuse(request, 429, "Too many requests. Try again in a minute.")
        if request.method not in ("GET", "HEAD", "POST"):
            return self._refuse(request, 405, "This page has no such method.")
        if session is None and path != SIGN_IN and not path.startswith(STATIC):
            is_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
            return RedirectResponse(SIGN_IN, 303) if is_page else self._refuse(request, 401, "Sign in first.")
        return await self._read_form(request, host) if request.method == "POST" else None

    async def _read_form(self, request: Request, host: str) -> Response | None:
        if not self._access.is_same_origin(request.headers.get("origin"), host):
            return self._refuse(request, 403, "This form is of another site.")
        if request.headers.get("content-type", "").split(";")[0].strip() != FORM:
            return self._refuse(request, 415, "This is no form.")
        try:
            form = await asyncio.wait_for(_form(request), FORM_SECONDS)
        except ClientDisconnect:
            return Response(status_code=400)
        except asyncio.TimeoutError:
            return self._refuse(request, 408, "This form has not arrived in time.")
        if form is None:
            return self._refuse(request, 413, "This form is too large.")
        if not self._access.is_csrf(request.state.session, form.get("csrf", "")):
            return self._refuse(request, 403, "This form is out of date. Reload the page and try again.")
        request.state.form = form
        return None


async def _form(request: Request) -> Mapping[str, str] | None:
    """The fields of a form; None if it is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES:
            return None
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=FIELDS))
    except ValueError:
        return None


class _Sender:
    """Sends a response with the security headers."""

    def __init__(self, send: Send, is_static: bool) -> None:
        self._send, self._is_static = send, is_static
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers["Cache-Control"] = "no-cache" if self._is_static else "no-store"
        await self._send(message)
