"""A web application behind the gate: pages from templates, the sign-in page, static files, and error pages.

Templates are Jinja's, with escaping. A package's templates extend `base.html` of this package.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from fedfmsl.web.access import SESSION_SECONDS, Access
from fedfmsl.web.gate import SIGN_IN, STATIC, Gate

_FOLDER = Path(__file__).parent


def application(
    title: str,
    routes: Sequence[BaseRoute],
    access: Access,
    templates: Path,
    filters: Mapping[str, Callable[..., Any]] | None = None,
) -> Starlette:
    """`templates`: the folder of the package's templates. `filters`: functions for them, by name."""
    loader = ChoiceLoader([FileSystemLoader(templates), FileSystemLoader(_FOLDER / "templates")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["site"] = title
    environment.filters |= dict(filters or {})
    app = Starlette(
        routes=[
            Mount(STATIC, StaticFiles(directory=_FOLDER / "static")),
            Route(SIGN_IN, _sign_in, methods=["GET", "POST"]),
            Route("/sign-out", _sign_out, methods=["POST"]),
            *routes,
        ],
        middleware=[Middleware(Gate, access=access, refuse=error_page)],
        exception_handlers={HTTPException: _http_error},
    )
    app.state.environment, app.state.access, app.state.closing = environment, access, threading.Event()
    return app


def page(request: Request, template: str, status: int = 200, **values: Any) -> Response:
    """An HTML page. `base.html` uses the request's CSRF token."""
    return HTMLResponse(fragment(request, template, **values), status)


def fragment(request: Request, template: str, **values: Any) -> str:
    """The HTML of a template: a page, or a part of one for `stream`."""
    shared = {"csrf": request.state.csrf, "can_sign_out": request.state.can_sign_out, "path": request.url.path}
    text: str = request.app.state.environment.get_template(template).render(**shared, **values)
    return text


def error_page(request: Request, status: int, reason: str) -> Response:
    """For a browser a page, for others a line of text."""
    if "text/html" not in request.headers.get("accept", ""):
        return Response(reason + "\n", status, media_type="text/plain")
    return page(request, "error.html", status, title=HTTPStatus(status).phrase, reason=reason)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    is_bare = error.detail == HTTPStatus(error.status_code).phrase  # of starlette: no route or file has the path
    return error_page(request, error.status_code, f"{request.url.path} is no page here." if is_bare else error.detail)


async def _sign_in(request: Request) -> Response:
    access: Access = request.app.state.access
    if request.state.session is not None:
        return RedirectResponse("/", 303)
    if request.method != "POST":
        return page(request, "sign_in.html", error="")
    address, now = request.client.host if request.client else "", time.monotonic()
    if not access.failures.allows(address, now, cost=0.0):
        return page(request, "sign_in.html", 429, error="Too many wrong tokens. Try again in a minute.")
    session = access.sign_in(request.state.form.get("token", ""))
    if session is None:
        access.failures.allows(address, now)
        return page(request, "sign_in.html", 403, error="This is not the token.")
    response = RedirectResponse("/", 303)
    response.set_cookie(
        access.cookie, session, int(SESSION_SECONDS), httponly=True, samesite="strict", secure=access.encrypted
    )
    return response


async def _sign_out(request: Request) -> Response:
    access: Access = request.app.state.access
    access.sign_out(request.state.session)
    response = RedirectResponse(SIGN_IN, 303)
    response.delete_cookie(access.cookie)
    return response
