"""Signatures with the key of an identity file, checked against the certificates of its CA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedfmsl.errors import ClockError, ConfigError, MessageError, one_line
from fedfmsl.transport.identity import pem_blocks, read_identity
from fedfmsl.transport.tls_errors import clock_behind

_PADDING = padding.PSS(padding.MGF1(SHA256()), padding.PSS.DIGEST_LENGTH)


@dataclass(frozen=True)
class Signer:
    """`certificate` in DER. `sign` returns the signature of a message."""

    certificate: bytes
    sign: Callable[[bytes], bytes]

    @classmethod
    def load(cls, identity: Path) -> Signer | None:
        """None if the identity has no key. Raises ConfigError if its key is of a kind that cannot sign."""
        if read_identity(identity).name is None:
            return None
        blocks = pem_blocks(identity.read_text("utf-8", errors="replace"))
        own, pem = (
            next(block for kind, block in blocks if kind.endswith(ending)).encode()
            for ending in ("CERTIFICATE", "PRIVATE KEY")
        )
        key = serialization.load_pem_private_key(pem, password=None)
        certificate = x509.load_pem_x509_certificate(own).public_bytes(serialization.Encoding.DER)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return cls(certificate, lambda message: key.sign(message, ec.ECDSA(SHA256())))
        if isinstance(key, ed25519.Ed25519PrivateKey):
            return cls(certificate, key.sign)
        if isinstance(key, rsa.RSAPrivateKey):
            return cls(certificate, lambda message: key.sign(message, _PADDING, SHA256()))
        raise ConfigError(
            f"identity {identity}: its key is neither EC, Ed25519 nor RSA; make one with devices.provision"
        )


class Authorities:
    """The certificates of a CA."""

    def __init__(self, pem: str) -> None:
        self._certificates = x509.load_pem_x509_certificates(pem.encode())

    def check(self, name: str, certificate: bytes, signature: bytes, message: bytes) -> None:
        """Raises MessageError unless the client `name` of this CA signed the message with a certificate that is valid
        now; ClockError if it is not valid yet."""
        try:
            own = x509.load_der_x509_certificate(certificate)
            self._check_certificate(name, own)
            _verify(own, signature, message)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            reason = one_line(error) or "it does not fit"
            raise MessageError(f"the signature of {name} is not valid: {reason}") from error

    def _check_certificate(self, name: str, certificate: x509.Certificate) -> None:
        """Raises ValueError."""
        now = datetime.now(timezone.utc)
        if not any(_issued(certificate, authority) for authority in self._certificates):
            raise ValueError("its certificate is of another CA")
        if now < certificate.not_valid_before_utc:
            since = f"{certificate.not_valid_before_utc:%Y-%m-%d}"
            raise ClockError(clock_behind(f"the certificate of {name} is valid from {since}"))
        if now > certificate.not_valid_after_utc:
            until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
            raise ValueError(f"its certificate expired on {until}; the clock of this machine says {now:%Y-%m-%d}")
        names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        if names != [name]:
            raise ValueError(f"its certificate is of {one_line(names)}")
        try:
            usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            return
        if ExtendedKeyUsageOID.CLIENT_AUTH not in usages or ExtendedKeyUsageOID.SERVER_AUTH in usages:
            raise ValueError("its certificate is not a device's, for authentication as a client only")


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _verify(certificate: x509.Certificate, signature: bytes, message: bytes) -> None:
    """Raises InvalidSignature, or ValueError for another kind of key."""
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, message, ec.ECDSA(SHA256()))
    elif isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, message)
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, message, _PADDING, SHA256())
    else:
        raise ValueError("its key is neither EC, Ed25519 nor RSA")
