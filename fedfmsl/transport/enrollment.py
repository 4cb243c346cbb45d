"""Requests for certificates: a device makes its key and asks, the authority of `devices.provision` answers.

A request is a certificate request (PKCS#10, RFC 2986) in PEM. Its challenge password (RFC 2985) is a proof:

    token:HMAC            of a one-time token, for a device's first certificate
    identity:SIGNATURE    of the present key, for a renewal

A proof covers the name and the public key of the request. So the token itself does not travel, and a copy of a request
gives a certificate to nobody else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import AttributeOID, NameOID

from fedfmsl.errors import ConfigError, one_line
from fedfmsl.protocol.topics import NAME, check_name

MAX_REQUEST_BYTES = 1 << 14
SECRET_BYTES = 16
_CONTEXT = b"fedfmsl certificate request\0"
_TOKEN = re.compile(rf"({NAME})\.([A-Za-z0-9_-]{{22}})\.([A-Za-z0-9_-]{{43}})")
_BY_TOKEN, _BY_IDENTITY = "token:", "identity:"


@dataclass(frozen=True)
class Token:
    """NAME.SECRET.FINGERPRINT: the device's name, 16 random bytes, and the SHA-256 of the CA's certificate, by which a
    device without that certificate recognizes it. The last two are in base64 for URLs, without padding."""

    name: str
    secret: str
    fingerprint: str

    @classmethod
    def make(cls, name: str, authority: str) -> Token:
        """`authority`: the CA's certificate in PEM."""
        return cls(name, _base64(secrets.token_bytes(SECRET_BYTES)), fingerprint(authority))

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raises ConfigError. Its text does not show the secret."""
        found = _TOKEN.fullmatch(text.strip())
        if found is None:
            raise ConfigError(
                "the token is not of the form NAME.SECRET.FINGERPRINT; pass all of what python -m devices.provision "
                "token NAME printed"
            )
        return cls(found[1], found[2], found[3])

    def __str__(self) -> str:
        return f"{self.name}.{self.secret}.{self.fingerprint}"

    @property
    def digest(self) -> bytes:
        """What the authority stores of the secret, and the key of proofs."""
        return hashlib.sha256(self.secret.encode()).digest()


@dataclass(frozen=True)
class Request:
    """A request whose own signature is valid: the sender has the private key of `key`, which is on curve P-256."""

    name: str
    key: ec.EllipticCurvePublicKey
    proof: str

    @classmethod
    def parse(cls, pem: bytes) -> Request:
        """Raises ConfigError if it is not a request, or not of a device."""
        try:
            request = x509.load_pem_x509_csr(pem[:MAX_REQUEST_BYTES])
            key = request.public_key()
            names = [str(each.value) for each in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
            proof = request.attributes.get_attribute_for_oid(AttributeOID.CHALLENGE_PASSWORD).value.decode("ascii")
            is_signed = request.is_signature_valid
        except x509.AttributeNotFound as error:
            raise ConfigError(
                "the request carries no token; make it with python -m edge_runtime enroll TOKEN"
            ) from error
        except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
            raise ConfigError(
                f"this is no certificate request in PEM ({one_line(error) or 'it is damaged'}); make one with python "
                "-m edge_runtime enroll"
            ) from error
        if not is_signed:
            raise ConfigError(
                "the request's signature is not that of its key; make another one with edge_runtime enroll"
            )
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ConfigError("the request's key is not on curve P-256; make another one with edge_runtime enroll")
        if len(names) != 1:
            raise ConfigError(
                f"the request names {len(names)} devices, not one; make another one with edge_runtime enroll"
            )
        return cls(check_name("device", names[0]), key, proof)

    @property
    def is_renewal(self) -> bool:
        return self.proof.startswith(_BY_IDENTITY)

    def is_proved_by_token(self, digest: bytes) -> bool:
        return hmac.compare_digest(self.proof.encode(), _token_proof(self.name, self.key, digest).encode())

    def is_proved_by(self, certificate: x509.Certificate) -> bool:
        """Whether the key of `certificate` has signed the proof."""
        present = certificate.public_key()
        if not self.is_renewal or not isinstance(present, ec.EllipticCurvePublicKey):
            return False
        try:
            signature = base64.b64decode(self.proof.removeprefix(_BY_IDENTITY), validate=True)
            present.verify(signature, _proved(self.name, self.key), ec.ECDSA(SHA256()))
        except (binascii.Error, InvalidSignature, ValueError):
            return False
        return True


def new_key() -> str:
    """A private key on curve P-256, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def require_key(pem: str, path: object) -> None:
    """Raises ConfigError if `pem`, which the file `path` holds, is no key of a device."""
    try:
        _private(pem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def first_request(key: str, token: Token) -> str:
    """The request for a device's first certificate, in PEM. `key`: its new private key in PEM. Raises ConfigError."""
    private = _private(key)
    return _request(private, token.name, _token_proof(token.name, private.public_key(), token.digest))


def renewal_request(key: str, name: str, present: str) -> str:
    """The request for a certificate of a new `key` of the device `name`, whose key is `present`. Raises ConfigError."""
    private = _private(key)
    signature = _private(present).sign(_proved(name, private.public_key()), ec.ECDSA(SHA256()))
    return _request(private, name, _BY_IDENTITY + base64.b64encode(signature).decode())


def fingerprint(certificate: str) -> str:
    """SHA-256 of a certificate in PEM, as a token has it. Raises ConfigError if it is no certificate."""
    try:
        return _base64(x509.load_pem_x509_certificate(certificate.encode()).fingerprint(SHA256()))
    except ValueError as error:
        raise ConfigError(f"this is no certificate in PEM ({one_line(error)}); check that it is the CA's") from error


def name_in(certificate: str) -> str:
    """The common name in a certificate in PEM. Raises ConfigError."""
    try:
        parsed = x509.load_pem_x509_certificate(certificate.encode())
        (name,) = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError as error:
        raise ConfigError(f"the answer holds a damaged certificate ({one_line(error)}); copy it again") from error
    return check_name("device", str(name.value))


def check_answer(key: str, certificate: str, authority: str) -> None:
    """Raises ConfigError unless the CA `authority` certifies `key`. All are in PEM."""
    try:
        own = x509.load_pem_x509_certificate(certificate.encode())
        own.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.encode()))
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        reason = one_line(error) or "another one signed it"
        raise ConfigError(f"the answer holds no certificate of its CA ({reason}); copy it again") from error
    if _public(own.public_key()) != _public(_private(key).public_key()):
        raise ConfigError("the answer is for another key than this device's; send its latest request again")


def _request(key: ec.EllipticCurvePrivateKey, name: str, proof: str) -> str:
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .add_attribute(AttributeOID.CHALLENGE_PASSWORD, proof.encode())
    )
    return builder.sign(key, SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def _token_proof(name: str, key: ec.EllipticCurvePublicKey, digest: bytes) -> str:
    return _BY_TOKEN + hmac.new(digest, _proved(name, key), "sha256").hexdigest()


def _proved(name: str, key: ec.EllipticCurvePublicKey) -> bytes:
    return _CONTEXT + name.encode() + b"\0" + _public(key)


def _public(key: object) -> bytes:
    """A public key in DER; b"" for one that is not on an elliptic curve."""
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return b""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _private(pem: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"this is no private key in PEM ({one_line(error)}); remove its file, and enroll again"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            "the device's key is not on an elliptic curve; renew it with python -m devices.provision --renew"
        )
    return key


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
