"""Identity files: one PEM file with what a process needs for TLS.

    private key, certificate, certificates of the CA     a device or a server
    certificates of the CA                               a client that only checks the broker (password option)

`python -m devices.provision` makes them. PEM blocks from any other CA work too, in the same order.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from fedfmsl.common.files import why_no_file
from fedfmsl.errors import ConfigError, one_line

NOTICE_SECONDS = 30 * 86400.0  # before a certificate expires
MAX_BYTES = 1 << 20  # of an identity file
CONSOLE_USAGE = "2.25.323032453919229874322479340807902485668"  # extended key usage: opens the console
_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\n.*?-----END \1-----", re.DOTALL)
_CERTIFICATE, _KEY = "CERTIFICATE", "PRIVATE KEY"


@dataclass(frozen=True)
class Identity:
    """`name`: the common name of the certificate; None if the file holds only certificates of a CA. `authorities`: the
    certificates of the CA in PEM; "" for those that the system trusts. `valid`: first and last moment of validity."""

    path: Path
    name: str | None
    authorities: str
    valid: tuple[datetime, datetime] | None = None

    def client_context(self) -> ssl.SSLContext:
        return self._load(trusting(self.authorities))

    def server_context(
        self, revoked: Path | None = None, clients: ssl.VerifyMode = ssl.CERT_REQUIRED
    ) -> ssl.SSLContext:
        """Accepts client certificates of the same CA that are not in the revocation list `revoked` (PEM); with
        `clients` CERT_OPTIONAL also clients without a certificate, with CERT_NONE it asks for none. Raises ConfigError
        if the file is not a server's, or the list is invalid."""
        if self.name is None or not self.authorities:
            raise ConfigError(
                f"{self.path} has only the CA's certificates, and a server also needs a private key and a certificate; "
                "give the server's --identity"
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = clients
        context.load_verify_locations(cadata=self.authorities)
        if revoked is not None:
            try:
                context.load_verify_locations(revoked)
            except OSError as error:  # ssl.SSLError is one
                raise ConfigError(
                    f"--revoked {revoked} is no readable revocation list in PEM ({one_line(error)}); pass the kit's "
                    "revoked.crl"
                ) from error
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
        return self._load(context)

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        if self.name is not None:
            try:
                context.load_cert_chain(self.path, password="")  # without a password OpenSSL would ask the terminal
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"identity {self.path}: key and certificate do not match ({error}); make one with devices.provision"
                ) from error
        return context


def read_identity(path: Path) -> Identity:
    """Raises ConfigError if the file is not an identity, or users other than its owner can read its key."""
    try:
        if path.exists() and (reason := why_no_file(path)):  # opening a pipe would wait for its writer
            raise ConfigError(f"identity {path} {reason}; make one with devices.provision")
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"identity {path} is too long for a PEM file; make one with devices.provision")
        text = path.read_text("utf-8", errors="replace")  # there may be any text around the PEM blocks
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"identity {path} is not readable ({error.strerror}); make one with devices.provision"
        ) from error
    blocks = pem_blocks(text)
    certificates = [block for kind, block in blocks if kind == _CERTIFICATE]
    has_key = any(kind.endswith(_KEY) for kind, _ in blocks)
    if not certificates:
        raise ConfigError(f"identity {path} holds no certificate in PEM; make one with devices.provision")
    if has_key and mode & 0o077:
        raise ConfigError(f"identity {path} holds a private key that others may read; chmod 600 {path}")
    own, authorities = (certificates[0], certificates[1:]) if has_key else (None, certificates)
    try:
        name, valid = _parse(own) if own else (None, None)
        trusting("\n".join(authorities))
    except (ValueError, ssl.SSLError) as error:
        raise ConfigError(
            f"identity {path} holds an unreadable certificate ({one_line(error)}); make one with devices.provision"
        ) from error
    identity = Identity(path, name, "\n".join(authorities), valid)
    identity.client_context()
    return identity


def operator_of(certificate: bytes) -> str:
    """The name of the operator whose certificate (DER) opens the console; "" for the certificates of others."""
    from cryptography import x509

    try:
        parsed = x509.load_der_x509_certificate(certificate)
        usages = parsed.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        return ""
    if x509.ObjectIdentifier(CONSOLE_USAGE) not in usages:
        return ""
    # all operators have one common name, by which the broker knows them
    names = [
        *parsed.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATIONAL_UNIT_NAME),
        *parsed.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME),
    ]
    return one_line(names[0].value) if names else ""


def describe_expiry(until: float, now: float, name: str) -> tuple[str, bool]:
    """When the certificate of `name` expires, for a reader, and whether it has to be renewed soon. Unix seconds."""
    day, left = f"until {datetime.fromtimestamp(until, timezone.utc):%Y-%m-%d}", f"{(until - now) / 86400:.0f} days"
    if until - now >= NOTICE_SECONDS:
        return f"{day}, {left}", False
    when = "it has expired" if until <= now else f"only {left}"
    return f"{day}, {when}: renew it with python -m devices.provision --renew {name}", True


def pem_blocks(text: str) -> list[tuple[str, str]]:
    """Kind and text of each PEM block."""
    return [(match[1], match[0]) for match in _BLOCK.finditer(text.replace("\r\n", "\n"))]


def device_name(configured: str | None, identity: Path | None) -> str | None:
    """The name in a device's certificate, or the `configured` one. Raises ConfigError if they differ: the broker
    silently drops what is published under another name."""
    name = read_identity(identity).name if identity else None
    if configured and name and configured != name:
        raise ConfigError(f"--device {configured!r}: identity {identity} is of {name!r}; omit --device")
    return name or configured


def client_context(identity: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or newer; checks certificate and host name of the peer. Without an identity, trusts the system's CAs.

    Raises ConfigError as `read_identity` does.
    """
    return read_identity(identity).client_context() if identity else trusting("")


def _parse(certificate: str) -> tuple[str, tuple[datetime, datetime]]:
    """Common name and validity of a certificate in PEM. Raises ValueError."""
    from cryptography import x509  # takes 8 MB; a process without an identity does not need it

    parsed = x509.load_pem_x509_certificate(certificate.encode())
    names = parsed.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if not names:
        raise ValueError("it has no common name")
    return str(names[0].value), (parsed.not_valid_before_utc, parsed.not_valid_after_utc)


def trusting(authorities: str) -> ssl.SSLContext:
    """The context of a client that trusts these certificates of a CA, in PEM; "": those of the system."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authorities:
        context.load_verify_locations(cadata=authorities)
    else:
        context.load_default_certs()
    return context
