"""What a TLS error means, and what to do about it."""

from __future__ import annotations

import ssl

# OpenSSL's codes of a failed verification (X509_V_ERR_…).
_VERIFICATION = {
    9: "its certificate is not valid yet; set this machine's clock",
    10: "its certificate has expired; renew it, or set this machine's clock",
    23: "its certificate is revoked",
    62: "its certificate is of another host; use a name it was made for (provision --host)",
    64: "its certificate is of another address; use a name it was made for (provision --host)",
}
_UNKNOWN_CA = "its certificate is not of the identity file's CA; check --broker and --identity"
# Parts of the names of a peer's alerts.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it asks for a certificate; give one with --identity",
    "CERTIFICATE_REVOKED": "our certificate is revoked; ask the operator for another --identity",
    "CERTIFICATE_EXPIRED": "our certificate has expired; ask the operator for another --identity",
    "UNKNOWN_CA": "our certificate is of another CA; ask the operator for another --identity",
    "BAD_CERTIFICATE": "it rejects our certificate; ask the operator for another --identity",
    "DECRYPT_ERROR": "our certificate is not of its CA; ask the operator for another --identity",
    "HANDSHAKE_FAILURE": "the TLS handshake failed; if it asks for a certificate, give --identity",
    "WRONG_VERSION_NUMBER": "it does not speak TLS on this port; check the port",
    "EOF": "it closed the connection; check that it speaks TLS on this port and accepts this --identity",
}


def explain(error: BaseException | None) -> str:
    """The meaning of a TLS error, as the end of an error message."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFICATION.get(error.verify_code, f"{_UNKNOWN_CA} ({error.verify_message})")
    name = str(getattr(error, "reason", "") or error).upper().replace(" ", "_")
    return next((meaning for part, meaning in _ALERTS.items() if part in name), str(error))
