"""Identity files: their content, and which are refused."""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path

import pytest

from devices.provisioning.authority import CLIENT, SERVER, Authority, Issued, make_authority
from edge_runtime.data.labels import read_labels
from fedfmsl.errors import ConfigError, InputError
from fedfmsl.transport.identity import describe_expiry, device_name, read_identity


@pytest.fixture(scope="module")
def authority() -> Authority:
    return make_authority("test")


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    return authority.issue("kitchen", [CLIENT, SERVER], ["localhost"])


def write(path: Path, *parts: str, mode: int = 0o600) -> Path:
    path.write_text("".join(parts))
    path.chmod(mode)
    return path


def test_an_identity_has_a_name_and_a_ca(authority: Authority, issued: Issued, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pem", issued.key_pem, issued.certificate_pem, authority.certificate_pem)
    identity = read_identity(path)
    assert identity.name == "kitchen"
    (trusted,) = identity.client_context().get_ca_certs()
    assert trusted["subject"] == ((("commonName", "test"),),)
    assert identity.client_context().check_hostname
    identity.server_context()


def test_an_identity_has_a_validity(tmp_path: Path) -> None:
    now = datetime(
        2048, 12, 31, 23, 59, 58, tzinfo=timezone.utc
    )  # ends after 2049, where DER writes the year with four digits
    issued = make_authority("test", now).issue("kitchen", [CLIENT], days=500, now=now)
    identity = read_identity(write(tmp_path / "x.pem", issued.key_pem, issued.certificate_pem))
    assert identity.valid == (issued.certificate.not_valid_before_utc, issued.certificate.not_valid_after_utc)


def test_there_may_be_any_text_around_an_identity(authority: Authority, issued: Issued, tmp_path: Path) -> None:
    pem = issued.key_pem + issued.certificate_pem + authority.certificate_pem
    path = write(tmp_path / "kitchen.toml", f'images = "/data/früchte"\nidentity = """\n{pem}"""\nrun = "orchard"\n')
    identity = read_identity(path)
    assert identity.name == "kitchen"
    assert len(identity.client_context().get_ca_certs()) == 1


def test_a_file_with_windows_line_ends_is_read(authority: Authority, issued: Issued, tmp_path: Path) -> None:
    text = issued.key_pem + issued.certificate_pem + authority.certificate_pem
    (tmp_path / "x.pem").write_bytes(text.replace("\n", "\r\n").encode())
    (tmp_path / "x.pem").chmod(0o600)
    assert read_identity(tmp_path / "x.pem").name == "kitchen"


def test_a_cas_certificate_alone_has_no_name(authority: Authority, tmp_path: Path) -> None:
    identity = read_identity(write(tmp_path / "ca.crt", authority.certificate_pem, mode=0o644))  # nothing secret
    assert identity.name is None
    assert len(identity.client_context().get_ca_certs()) == 1
    with pytest.raises(
        ConfigError, match="a server also needs a private key and a certificate; give the server's --identity"
    ):
        identity.server_context()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_that_others_may_read_is_refused(authority: Authority, issued: Issued, tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "x.pem", issued.key_pem, issued.certificate_pem, authority.certificate_pem, mode=mode)
    with pytest.raises(ConfigError, match=f"private key that others may read; chmod 600 {path}"):
        read_identity(path)


def test_a_key_of_another_certificate_is_refused(authority: Authority, issued: Issued, tmp_path: Path) -> None:
    other = authority.issue("other", [CLIENT])
    path = write(tmp_path / "x.pem", other.key_pem, issued.certificate_pem, authority.certificate_pem)
    with pytest.raises(ConfigError, match="do not match"):
        read_identity(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no PEM",
        "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
        "-----BEGIN CERTIFICATE-----\n????\n-----END CERTIFICATE-----\n",
        "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n",
        "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n"
        "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
        "\N{SNOWMAN}",
    ],
)
def test_an_unusable_file_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"x\.pem") as caught:
        read_identity(write(tmp_path / "x.pem", text))
    assert len(str(caught.value).splitlines()) == 1


def test_a_cut_certificate_is_named(authority: Authority, issued: Issued, tmp_path: Path) -> None:
    lines = issued.certificate_pem.splitlines(keepends=True)
    for cut in range(1, len(lines) - 2):
        path = write(tmp_path / "x.pem", issued.key_pem, *lines[:cut], lines[-1], authority.certificate_pem)
        with pytest.raises(ConfigError):
            read_identity(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not readable"):
        read_identity(tmp_path / "nowhere.pem")


def test_a_device_has_the_name_of_its_certificate(authority: Authority, issued: Issued, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pem", issued.key_pem, issued.certificate_pem, authority.certificate_pem)
    assert device_name(None, path) == device_name("kitchen", path) == "kitchen"
    assert device_name("other", None) == "other"
    with pytest.raises(ConfigError, match=r"--device 'other'.*omit --device"):
        device_name("other", path)


def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pem")
    with pytest.raises(ConfigError, match=r"x\.pem is neither a file nor a folder"):
        read_identity(tmp_path / "x.pem")
    with pytest.raises(InputError, match=r"x\.pem: it is neither a file nor a folder"):
        read_labels(tmp_path / "x.pem")


@pytest.mark.parametrize(
    ("days", "says"),
    [(31, "until 2030-02-01, 31 days"), (10, "only 10 days: renew it with"), (-1, "it has expired: renew it with")],
)
def test_an_expiry_is_announced_thirty_days_ahead(days: int, says: str) -> None:
    until = datetime(2030, 2, 1, 12, tzinfo=timezone.utc).timestamp()
    text, is_soon = describe_expiry(until, until - days * 86400, "kitchen")
    assert says in text and is_soon == (days < 30)
