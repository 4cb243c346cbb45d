"""Certificates for devices that make their keys themselves: one-time tokens, and answers to requests.

PKI/tokens/NAME.json    the hash of the secret of a token, until when it is valid, and when it was used

An answer is the device's file without its key. The same request gets the same answer again, so that an answer that was
lost on its way can be asked for once more; that helps nobody without the key of the request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from pydantic import BaseModel, ConfigDict, ValidationError

from devices.provisioning.authority import CLIENT, Authority, pem, revoked_serials
from devices.provisioning.fleet import RESERVED, Fleet, device_file
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError
from fedfmsl.transport.enrollment import Request, Token
from fedfmsl.transport.settings import HOME_ASSISTANT

COMMAND = "python -m devices.provision token"
MOST_VALID = 8  # certificates of one device at a time, so that a stolen key cannot fill the disk


class StoredToken(BaseModel):
    """`digest`: the SHA-256 of the secret in hexadecimal. `used`: None if it was not used yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    until: datetime
    used: datetime | None = None


@dataclass(frozen=True)
class Enrollment:
    """Issues certificates for requests. Several processes and threads may do so at the same time."""

    fleet: Fleet

    def make_token(self, name: str, valid: timedelta, now: datetime | None = None) -> Token:
        """A token for a new device, which replaces an earlier one of this name. Raises ConfigError if the name is taken
        or the broker uses passwords."""
        self._check_name(name)
        with self.fleet.locked():
            self.fleet.check_free(name)
            token = Token.make(name, self.fleet.authority().certificate_pem)
            self._store(name, StoredToken(digest=token.digest.hex(), until=(now or _now()) + valid))
        return token

    def answer(self, request_pem: bytes, now: datetime | None = None) -> tuple[str, str]:
        """The device's name and its answer. Raises ConfigError if the request is refused."""
        now = now or _now()
        request = Request.parse(request_pem)
        self._check_name(request.name)
        with self.fleet.locked():
            authority = self.fleet.authority()
            valid = list(self._valid_certificates(request.name, now))
            certificate = next((each for each in valid if each.public_key() == request.key), None)
            if certificate is None:
                if request.is_renewal:
                    _check_renewal(request, valid, now)
                else:
                    self._check_token(request, now)
                certificate = authority.certify(request.key, request.name, [CLIENT], now=now)
                self.fleet.record(request.name, pem(certificate))
                self._mark_used(request, now)
            return request.name, self._device_file(request.name, certificate, authority)

    def _device_file(self, name: str, certificate: x509.Certificate, authority: Authority) -> str:
        settings = self.fleet.settings([], None, None)
        return device_file(name, settings, {"identity": pem(certificate) + authority.certificate_pem})

    def _check_name(self, name: str) -> None:
        # the identities of these are made on this machine, and have other rights
        if name in RESERVED or name == HOME_ASSISTANT or self.fleet.is_operator(name):
            raise ConfigError(f"device name {name!r} is reserved; choose another")
        if self.fleet.has_passwords:
            raise ConfigError(
                f"the broker of {self.fleet.folder} uses passwords, so devices have no keys; add them with --user"
            )

    def _valid_certificates(self, name: str, now: datetime) -> Iterator[x509.Certificate]:
        """Of a device, those that are neither expired nor revoked."""
        path = self.fleet.issued(name)
        if not path.is_file():  # the name is free, or was revoked
            return
        try:
            revoked = set(revoked_serials((self.fleet.folder / "broker" / "revoked.crl").read_bytes()))
            certificates = x509.load_pem_x509_certificates(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.fleet.folder} has no readable certificates of {name} ({error})") from error
        for certificate in certificates:
            if certificate.serial_number not in revoked and now <= certificate.not_valid_after_utc:
                yield certificate

    # tokens

    def _check_token(self, request: Request, now: datetime) -> None:
        """Raises ConfigError unless the request has the unused token of its device."""
        name, again = request.name, f"make another one with {COMMAND} {request.name}"
        token = self._stored(self.fleet.token(name))
        if token is None or not request.is_proved_by_token(bytes.fromhex(token.digest)):
            if other := self._name_of_token(request):
                raise ConfigError(f"the request is for {name}, but its token is for {other}; {again}")
            raise ConfigError(
                f"the token of the request is not the present one of {name}: mistyped, revoked or replaced; {again}"
            )
        if token.used is not None:
            raise ConfigError(f"the token of {name} was used on {token.used:%Y-%m-%d %H:%M} UTC; {again}")
        if now > token.until:
            raise ConfigError(f"the token of {name} expired on {token.until:%Y-%m-%d %H:%M} UTC; {again}")
        self.fleet.check_free(name)

    def _name_of_token(self, request: Request) -> str:
        """The device whose token the request has; "" if there is none. A proof covers the name of the request."""
        for path in sorted((self.fleet.folder / "tokens").glob("*.json")):
            token = self._stored(path)
            if token is not None and request.is_proved_by_token(bytes.fromhex(token.digest)):
                return path.stem
        return ""

    def _mark_used(self, request: Request, now: datetime) -> None:
        token = self._stored(self.fleet.token(request.name))
        if token is not None and not request.is_renewal:
            self._store(request.name, token.model_copy(update={"used": now}))

    def _store(self, name: str, token: StoredToken) -> None:
        write_atomically(self.fleet.token(name), token.model_dump_json().encode(), durable=True)

    @staticmethod
    def _stored(path: Path) -> StoredToken | None:
        try:
            return StoredToken.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise ConfigError(f"{path} holds no token; remove it, and make another one with {COMMAND} NAME") from error


def _check_renewal(request: Request, valid: list[x509.Certificate], now: datetime) -> None:
    """Raises ConfigError unless the key of a valid certificate, in the second half of its life, asks for the next."""
    name = request.name
    if not valid:
        raise ConfigError(
            f"{name} has no valid certificate: it was revoked, has expired, or never had one; make a token with "
            f"{COMMAND} {name}"
        )
    present = next((each for each in valid if request.is_proved_by(each)), None)
    if present is None:
        raise ConfigError(f"the request is not signed with the key of a valid certificate of {name}")
    half = present.not_valid_before_utc + (present.not_valid_after_utc - present.not_valid_before_utc) / 2
    if now < half:
        raise ConfigError(
            f"the certificate of {name} can be renewed from {half:%Y-%m-%d} on, in the second half of its life"
        )
    if len(valid) >= MOST_VALID:
        raise ConfigError(f"{name} has {len(valid)} valid certificates already; revoke it if you do not know why")


def _now() -> datetime:
    return datetime.now(timezone.utc)
