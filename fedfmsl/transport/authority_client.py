"""Asks the authority of `devices.provision serve` for a certificate, over HTTPS.

A device without the CA's certificate fetches it first, over a connection that it does not trust, and compares it with
the fingerprint in its token. The request follows over a second connection, which trusts only this CA.
"""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request

from fedfmsl.errors import ConfigError, RunError, one_line
from fedfmsl.transport.enrollment import fingerprint
from fedfmsl.transport.identity import trusting
from fedfmsl.transport.tls_errors import explain, is_early

AUTHORITY, SIGN = "/ca", "/sign"  # paths: the CA's certificate, and where requests go
MAX_ANSWER_BYTES = 1 << 16
SECONDS = 30.0


def fetch_authority(address: str, expected: str) -> str:
    """The CA's certificate in PEM. Raises ConfigError if its fingerprint is not the `expected` one of a token, RunError
    if HOST:PORT `address` does not answer."""
    untrusting = trusting("")
    untrusting.check_hostname = False
    untrusting.verify_mode = ssl.CERT_NONE
    found = _exchange(address, AUTHORITY, None, untrusting)
    if fingerprint(found) != expected:
        raise ConfigError(
            f"{address} has another CA than the token names; check --authority, and which machine answers there"
        )
    return found


def request_certificate(address: str, request: str, authority: str) -> str:
    """The answer to a `request`: the text of the device's file without its key. `authority`: the certificate of the
    CA, which the connection must have. Raises ConfigError if the request is refused, RunError if there is no answer."""
    return _exchange(address, SIGN, request.encode(), trusting(authority))


def _exchange(address: str, path: str, body: bytes | None, context: ssl.SSLContext) -> str:
    url = f"https://{address}{path}"
    request = urllib.request.Request(url, body, {"Content-Type": "application/pkcs10"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS, context=context) as response:
            answer: bytes = response.read(MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        reason = one_line(error.read(MAX_ANSWER_BYTES).decode(errors="replace"))
        if error.code == 403:
            raise ConfigError(f"{address} refuses the request: {reason}") from error
        raise RunError(f"{address} has no answer now: HTTP {error.code} ({reason}); try again") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLCertVerificationError) and not is_early(cause):
            text = f"its certificate is not that of this address and CA: {one_line(cause.verify_message)}"
        else:
            text = explain(cause) if isinstance(cause, ssl.SSLError) else one_line(cause)
        raise RunError(
            f"no answer from the authority at {address} ({text}); check --authority, and that python -m "
            "devices.provision serve runs there"
        ) from error
    return answer.decode(errors="replace")
