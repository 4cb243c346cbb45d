"""What a TLS error means, and what to do about it."""

from __future__ import annotations

import ssl
from datetime import datetime, timezone

# OpenSSL's codes of a failed verification (X509_V_ERR_…).
_VERIFICATION = {
    10: "its certificate has expired; renew it, or set this machine's clock",
    23: "its certificate is revoked",
    62: "its certificate is of another host; use a name it was made for (provision --host)",
    64: "its certificate is of another address; use a name it was made for (provision --host)",
}
_NOT_YET_VALID = (9, 11)  # a certificate, a revocation list
_NEW_IDENTITY = "ask the operator for another --identity"
_UNKNOWN_CA = "its certificate is not of the identity file's CA; check --broker and --identity"
# Parts of the names of a peer's alerts.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it asks for a certificate; give one with --identity",
    "CERTIFICATE_REVOKED": f"our certificate is revoked; {_NEW_IDENTITY}",
    "CERTIFICATE_EXPIRED": f"our certificate has expired; {_NEW_IDENTITY}",
    "UNKNOWN_CA": f"our certificate is of another CA; {_NEW_IDENTITY}",
    "BAD_CERTIFICATE": f"it rejects our certificate; {_NEW_IDENTITY}",
    "DECRYPT_ERROR": f"our certificate is not of its CA; {_NEW_IDENTITY}",
    "HANDSHAKE_FAILURE": "the TLS handshake failed; if it asks for a certificate, give --identity",
    "WRONG_VERSION_NUMBER": "it does not speak TLS on this port; check the port",
    "EOF": "it closed the connection; check that it speaks TLS on this port and accepts this --identity",
}
_REJECTIONS = {"CERTIFICATE_REVOKED", "CERTIFICATE_EXPIRED", "UNKNOWN_CA", "BAD_CERTIFICATE", "DECRYPT_ERROR"}


def explain(error: BaseException | None, valid_from: datetime | None = None) -> str:
    """The meaning of a TLS error, as the end of an error message. `valid_from`: of this machine's own certificate."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if is_early(error):
            own = f"; this machine's own is valid from {valid_from:%Y-%m-%d}" if valid_from else ""
            return clock_behind(f"its certificate is not valid yet{own}")
        return _VERIFICATION.get(error.verify_code, f"{_UNKNOWN_CA} ({error.verify_message})")
    return next((meaning for part, meaning in _ALERTS.items() if part in _name(error)), str(error))


def is_early(error: BaseException) -> bool:
    """Whether a certificate is not valid yet, so that the clock of this machine is behind."""
    return isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in _NOT_YET_VALID


def clock_behind(what: str) -> str:
    """The line for a certificate that is not valid yet."""
    now = datetime.now(timezone.utc)
    return f"the clock of this machine says {now:%Y-%m-%d}, but {what}; set the clock, e.g. by NTP"


def is_rejection(error: BaseException | None) -> bool:
    """Whether the peer refuses this machine's certificate, which no retry changes."""
    if error is None or isinstance(error, ssl.SSLCertVerificationError):
        return False
    return next((part in _REJECTIONS for part in _ALERTS if part in _name(error)), False)


def _name(error: BaseException | None) -> str:
    """The name of a peer's alert, as OpenSSL or Python write it."""
    return str(getattr(error, "reason", "") or error).upper().replace(" ", "_")
