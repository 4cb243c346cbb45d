"""Identity files: one PEM file that holds all that a process needs to show who it is and to know whom it talks to.

    its private key, its certificate, the certificates of the CA         a device, a server
    the certificates of the CA                                           who only checks the broker's (password option)

`python -m devices.provision` makes them; any other CA's PEM blocks in that order will do.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from fedfmsl.errors import ConfigError

_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\n.*?-----END \1-----", re.DOTALL)
_CERTIFICATE, _KEY = "CERTIFICATE", "PRIVATE KEY"
_COMMON_NAME = b"\x55\x04\x03"  # 2.5.4.3 in DER
_VERSION_TAG, _UTC_TIME = 0xA0, 0x17
_VALIDITY, _SUBJECT = 3, 4  # behind the serial number, the algorithm and the issuer
LONGEST = 1 << 20  # bytes of an identity file

# What verification fails with (OpenSSL's X509_V_ERR_…) and a peer's alerts, as parts of a name: what to do about it.
_VERIFY = {
    9: "its certificate is not valid yet; set this machine's clock",
    10: "its certificate has expired; renew it, or set this machine's clock",
    23: "its certificate is revoked",
    62: "its certificate is of another host; use a name it was made for (provision --host)",
    64: "its certificate is of another address; use a name it was made for (provision --host)",
}
_UNKNOWN_CA = "its certificate is not of the identity file's CA; is it the right broker, the right --identity?"
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it asks for a certificate; give one with --identity",
    "CERTIFICATE_REVOKED": "our certificate is revoked; ask the operator for another --identity",
    "CERTIFICATE_EXPIRED": "our certificate has expired; ask the operator for another --identity",
    "UNKNOWN_CA": "our certificate is of another CA than its own; ask the operator for another --identity",
    "BAD_CERTIFICATE": "our certificate does not suit it; ask the operator for another --identity",
    "DECRYPT_ERROR": "our certificate is not of its CA; ask the operator for another --identity",
    "HANDSHAKE_FAILURE": "it found no common ground; does it ask for a certificate (--identity)?",
    "WRONG_VERSION_NUMBER": "it does not speak TLS on this port; check the port",
    "EOF": "it ended the connection without a word; does it speak TLS on this port, does it want us?",
}


@dataclass(frozen=True)
class Identity:
    path: Path
    name: str | None  # the common name of its certificate; None where there is only a CA's
    authorities: str  # the CA's certificates in PEM, "" for those that the system trusts
    valid: tuple[datetime, datetime] | None = None  # from when until when its certificate is

    def client_context(self) -> ssl.SSLContext:
        return self._loaded(_client_context(self.authorities))

    def server_context(self) -> ssl.SSLContext:
        """Lets in whoever shows a certificate of the same CA. Raises ConfigError if the file cannot be a server's."""
        if self.name is None or not self.authorities:
            raise ConfigError(
                f"{self.path} has no private key and certificate of its own beside its CA's, which a server needs; "
                "give the server's --identity"
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.authorities)
        return self._loaded(context)

    def _loaded(self, context: ssl.SSLContext) -> ssl.SSLContext:
        if self.name is not None:
            try:
                context.load_cert_chain(self.path, password="")  # an empty one, or OpenSSL would ask the terminal
            except (OSError, ValueError) as error:
                raise ConfigError(f"identity {self.path}: key and certificate do not go together ({error})") from error
        return context


def read_identity(path: Path) -> Identity:
    """Raises ConfigError if the file is not an identity, or others than its owner may read the key in it."""
    try:
        if path.stat().st_size > LONGEST:
            raise ConfigError(f"identity {path} is not a PEM file with a key and certificates: too long")
        text = path.read_text("utf-8", errors="replace")  # around the blocks there may be anything
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"identity {path} is not readable ({error}); make one with devices.provision") from error
    blocks = [(match[1], match[0]) for match in _BLOCK.finditer(text.replace("\r\n", "\n"))]
    certificates = [block for kind, block in blocks if kind == _CERTIFICATE]
    has_key = any(kind.endswith(_KEY) for kind, _ in blocks)
    if not certificates:
        raise ConfigError(f"identity {path} holds no certificate in PEM; make one with devices.provision")
    if has_key and mode & 0o077:
        raise ConfigError(f"identity {path} holds a private key that others may read; chmod 600 {path}")
    own, authorities = (certificates[0], certificates[1:]) if has_key else (None, certificates)
    try:
        der = ssl.PEM_cert_to_DER_cert(own) if own else None
        name, valid = (common_name(der), validity(der)) if der is not None else (None, None)
        _client_context("\n".join(authorities))
    except (ValueError, IndexError, ssl.SSLError) as error:
        raise ConfigError(f"identity {path} holds a certificate that is none ({error})") from error
    identity = Identity(path, name, "\n".join(authorities), valid)
    identity.client_context()
    return identity


def device_name(wanted: str | None, identity: Path | None) -> str | None:
    """The name that a device's identity gives it. Raises ConfigError if another is wanted: the broker would drop what
    is published under it without a word."""
    name = read_identity(identity).name if identity else None
    if wanted and name and wanted != name:
        raise ConfigError(f"--device {wanted!r}: identity {identity} is of {name!r}; leave --device away")
    return name or wanted


def client_context(identity: Identity | None) -> ssl.SSLContext:
    """Of TLS 1.2 or newer, with the peer's certificate and name checked; without an identity, against the system's."""
    return identity.client_context() if identity else _client_context("")


def common_name(certificate: bytes) -> str:
    """Of the subject of a certificate in DER. Raises ValueError or IndexError if it has none, or is none."""
    for _, names in _fields(_signed(certificate)[_SUBJECT]):
        for _, attribute in _fields(names):
            (_, kind), (_, value) = _fields(attribute)
            if kind == _COMMON_NAME:
                return value.decode()
    raise ValueError("it names nobody")


def validity(certificate: bytes) -> tuple[datetime, datetime]:
    """From when until when a certificate in DER is valid. Raises ValueError or IndexError if it is none."""
    start, end = (_time(tag, value) for tag, value in _fields(_signed(certificate)[_VALIDITY]))
    return start, end


def _time(tag: int, value: bytes) -> datetime:
    """Two digits of a year are of 1950 to 2049 (RFC 5280, 4.1.2.5.1)."""
    text = value.decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc)


def _signed(certificate: bytes) -> list[bytes]:
    """What is signed of a certificate in DER, field by field, from the serial number on (RFC 5280, 4.1). The standard
    library shows a certificate only of a live connection's peer, and `cryptography` is too large for a device."""
    (_, whole), *_ = _fields(certificate)
    (_, signed), *_ = _fields(whole)
    return [value for tag, value in _fields(signed) if tag != _VERSION_TAG]


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The tags and contents of a DER sequence."""
    at = 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            width = length & 0x7F
            length, at = int.from_bytes(data[at : at + width], "big"), at + width
        yield tag, data[at : at + length]
        at += length


def _client_context(authorities: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authorities:
        context.load_verify_locations(cadata=authorities)
    else:
        context.load_default_certs()
    return context


def explain(error: BaseException | None) -> str:
    """What an error of TLS means, and what to do, for the end of a line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY.get(error.verify_code, f"{_UNKNOWN_CA} ({error.verify_message})")
    name = str(getattr(error, "reason", "") or error).upper().replace(" ", "_")
    return next((what for part, what in _ALERTS.items() if part in name), str(error))
