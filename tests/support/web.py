"""Requests to a web page of this machine."""

from __future__ import annotations

import http.client
import re
import ssl
from typing import Any
from urllib.parse import urlencode

from fedfmsl.web.serve import WebServer


def ask(
    site: WebServer,
    path: str = "/",
    form: Any = None,
    method: str = "",
    context: ssl.SSLContext | None = None,
    **headers: str,
) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of the answer. `form`: the fields of a POST request, or its body. `context`: for TLS."""
    if context:
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            "localhost", site.port, timeout=30, context=context
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
    sent = {"Accept": "text/html"} | {name.replace("_", "-"): value for name, value in headers.items()}
    body = None
    if form is not None:
        body = form if isinstance(form, str) else urlencode(form)
        sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
    connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text, dict(answer.getheaders())


def csrf_of(text: str) -> str:
    found = re.search(r'name="csrf" content="(\w+)"', text)
    assert found
    return found[1]
