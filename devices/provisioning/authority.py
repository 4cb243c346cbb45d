"""A small certificate authority for a fleet. Works on certificates; `fleet` reads and writes the files."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from fedfmsl.transport.identity import CONSOLE_USAGE

CA_DAYS = 3650
IDENTITY_DAYS = 825  # the longest validity that common TLS libraries accept
CLOCK_SKEW = timedelta(days=1)  # a device's clock may be behind before its first time synchronization

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
CONSOLE = ObjectIdentifier(CONSOLE_USAGE)


@dataclass(frozen=True)
class Issued:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> str:
        return pem(self.certificate)

    @property
    def key_pem(self) -> str:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()

    def pkcs12(self, name: str, password: str) -> bytes:
        """Key and certificate in the form that browsers import."""
        encryption = serialization.BestAvailableEncryption(password.encode())
        return pkcs12.serialize_key_and_certificates(name.encode(), self.key, self.certificate, None, encryption)


@dataclass(frozen=True)
class Authority(Issued):
    """A CA, which issues and revokes certificates. Keys use curve P-256, which small devices and AWS IoT support."""

    def issue(
        self,
        name: str,
        usages: Sequence[x509.ObjectIdentifier],
        hosts: Sequence[str] = (),
        days: int = IDENTITY_DAYS,
        now: datetime | None = None,
        unit: str = "",
    ) -> Issued:
        """A new key and its certificate. See `certify`."""
        key = ec.generate_private_key(ec.SECP256R1())
        return Issued(self.certify(key.public_key(), name, usages, hosts, days, now, unit), key)

    def certify(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        usages: Sequence[x509.ObjectIdentifier],
        hosts: Sequence[str] = (),
        days: int = IDENTITY_DAYS,
        now: datetime | None = None,
        unit: str = "",
    ) -> x509.Certificate:
        """A certificate of `key` with common name `name` and organizational unit `unit` for `usages`, valid for `days`,
        but not longer than the CA. A server's certificate also names its `hosts` (names or addresses). Raises
        ValueError if a host is invalid."""
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # digital signature
        builder = (
            _builder(name, self.certificate.subject, key, days, now, self.certificate.not_valid_after_utc, unit)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def revocation_list(self, serials: Iterable[int], now: datetime | None = None) -> str:
        """In PEM. Valid as long as the CA, because mosquitto refuses every client once the list has expired."""
        start = (now or _now()) - CLOCK_SKEW
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(start)
            .next_update(self.certificate.not_valid_after_utc)
        )
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(start).build()
            builder = builder.add_revoked_certificate(revoked)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def make_authority(name: str, now: datetime | None = None) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # certificates and CRLs
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(name, subject, key.public_key(), CA_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return Authority(builder.sign(key, hashes.SHA256()), key)


def load_authority(certificate: bytes, key: bytes) -> Authority:
    """Raises ValueError if they are not a certificate and an elliptic curve's private key in PEM."""
    loaded = serialization.load_pem_private_key(key, password=None)
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not an elliptic curve key")
    return Authority(x509.load_pem_x509_certificate(certificate), loaded)


def serials_of(certificates: bytes) -> list[int]:
    """Serial numbers of the certificates in a PEM text. Raises ValueError if there is none."""
    return [certificate.serial_number for certificate in x509.load_pem_x509_certificates(certificates)]


def name_of(certificates: bytes) -> str:
    """The common name of the certificates of one member in a PEM text. Raises ValueError if there is none."""
    (common,) = x509.load_pem_x509_certificates(certificates)[0].subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(common.value)


def hosts_of(certificate: bytes) -> list[str]:
    """The names and addresses that a server's certificate is for. Raises ValueError if it has none."""
    try:
        found = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except x509.ExtensionNotFound as error:
        raise ValueError("its certificate names no host") from error
    return [str(name.value) for name in found.value]


def revoked_serials(revocation_list: bytes) -> list[int]:
    """Serial numbers in a revocation list in PEM. Raises ValueError if it is invalid."""
    return [revoked.serial_number for revoked in x509.load_pem_x509_crl(revocation_list)]


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _builder(
    name: str,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime | None,
    latest: datetime | None = None,
    unit: str = "",
) -> x509.CertificateBuilder:
    start = (now or _now()) - CLOCK_SKEW
    end = start + timedelta(days=days)
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if unit:
        subject.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(min(end, latest) if latest else end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _now() -> datetime:
    return datetime.now(timezone.utc)
