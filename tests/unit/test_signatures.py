"""Signatures of devices: only the device that a certificate of the CA names can sign for its name."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from devices.provisioning.authority import CLIENT, SERVER, Authority, Issued, make_authority
from fedfmsl.errors import ClockError, MessageError
from fedfmsl.transport.signatures import Authorities, Signer

MESSAGE = b"keys"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return make_authority("test")


def signer(folder: Path, issued: Issued, authority: Authority) -> Signer:
    path = folder / "identity.toml"
    path.write_text(f'run = "orchard"\nidentity = """\n{issued.key_pem}{issued.certificate_pem}"""\n')
    path.chmod(0o600)
    loaded = Signer.load(path)
    assert loaded is not None
    return loaded


def test_a_device_signs_for_its_own_name_only(authority: Authority, tmp_path: Path) -> None:
    kitchen = signer(tmp_path, authority.issue("kitchen", [CLIENT]), authority)
    authorities, signature = Authorities(authority.certificate_pem), kitchen.sign(MESSAGE)
    authorities.check("kitchen", kitchen.certificate, signature, MESSAGE)
    for name, signed, message in (
        ("garden", signature, MESSAGE),
        ("kitchen", signature, b"other keys"),
        ("kitchen", b"", MESSAGE),
    ):
        with pytest.raises(MessageError, match=f"the signature of {name} is not valid"):
            authorities.check(name, kitchen.certificate, signed, message)
    with pytest.raises(MessageError, match="the signature of kitchen is not valid"):
        authorities.check("kitchen", b"no certificate", signature, MESSAGE)
    unknown_version = kitchen.certificate.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x64", 1)
    with pytest.raises(MessageError, match="the signature of kitchen is not valid: 100 is not"):
        authorities.check("kitchen", unknown_version, signature, MESSAGE)


@pytest.mark.parametrize(
    ("usages", "year", "other_ca", "error"),
    [
        ([CLIENT], None, True, "of another CA"),
        ([CLIENT], 2020, False, "expired"),
        ([SERVER, CLIENT], None, False, "not a device's"),
    ],
)
def test_a_certificate_must_be_a_valid_one_of_a_device(
    authority: Authority, tmp_path: Path, usages: list, year: int | None, other_ca: bool, error: str
) -> None:
    now = datetime(year, 1, 1, tzinfo=timezone.utc) if year else None
    issuer = make_authority("test") if other_ca else authority
    kitchen = signer(tmp_path, issuer.issue("kitchen", usages, ["localhost"], now=now), authority)
    with pytest.raises(MessageError, match=error):
        Authorities(authority.certificate_pem).check("kitchen", kitchen.certificate, kitchen.sign(MESSAGE), MESSAGE)


def test_an_identity_without_a_key_cannot_sign(authority: Authority, tmp_path: Path) -> None:
    path = tmp_path / "ca.crt"
    path.write_text(authority.certificate_pem)
    assert Signer.load(path) is None


def test_a_clock_that_is_behind_is_named_and_not_taken_for_a_forgery(authority: Authority, tmp_path: Path) -> None:
    start = datetime.now(timezone.utc) + timedelta(days=10)
    kitchen = signer(tmp_path, authority.issue("kitchen", [CLIENT], now=start), authority)
    since = f"{start - timedelta(days=1):%Y-%m-%d}"
    says = f"the clock of this machine says .*, but the certificate of kitchen is valid from {since}; set the clock"
    with pytest.raises(ClockError, match=says):
        Authorities(authority.certificate_pem).check("kitchen", kitchen.certificate, kitchen.sign(MESSAGE), MESSAGE)
