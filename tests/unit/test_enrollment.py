"""Devices that make their keys themselves: tokens, requests, answers by file and over HTTPS."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from support.processes import free_port
from typer.testing import CliRunner

from devices.provision import app as provision
from devices.provisioning.authority import IDENTITY_DAYS, make_authority, serials_of
from devices.provisioning.authority_server import BURST, Contexts, serve
from devices.provisioning.enrollment import MOST_VALID, Enrollment
from devices.provisioning.fleet import Fleet
from devices.provisioning.settings_file import read_table
from edge_runtime.__main__ import app as edge
from edge_runtime.settings import Settings
from fedfmsl.common.settings import read_settings
from fedfmsl.errors import ConfigError, RunError
from fedfmsl.transport.authority_client import fetch_authority, request_certificate
from fedfmsl.transport.enrollment import MAX_REQUEST_BYTES, Request, Token, first_request, new_key, renewal_request
from fedfmsl.transport.identity import pem_blocks, read_identity

NOW = datetime.now(timezone.utc)
DAY = timedelta(days=1)


@pytest.fixture
def pki(tmp_path: Path) -> Iterator[Path]:
    before = os.umask(0o022)
    run(provision, "--pki", tmp_path / "pki", "--host", "localhost", "--run", "orchard")
    yield tmp_path / "pki"
    os.umask(before)


@pytest.fixture
def enrollment(pki: Path) -> Enrollment:
    return Enrollment(Fleet(pki, lambda line: None))


def run(app: object, *arguments: object) -> str:
    """The command's output. Raises the command's errors."""
    return CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False).stdout  # type: ignore[arg-type]


def token_for(pki: Path, name: str = "kitchen") -> str:
    return run(provision, "token", name, "--pki", pki).strip()


def key_in(path: Path) -> str:
    return next(block for kind, block in pem_blocks(path.read_text()) if kind.endswith("PRIVATE KEY"))


def first(enrollment: Enrollment, key: str, name: str = "kitchen", now: datetime = NOW) -> str:
    """Enrolls a device, and returns its answer."""
    token = enrollment.make_token(name, DAY, now)
    return enrollment.answer(first_request(key, token).encode(), now)[1]


def test_a_request_and_its_answer_travel_as_files_and_the_key_stays(pki: Path, tmp_path: Path) -> None:
    device, request = tmp_path / "device", tmp_path / "request.pem"
    device.mkdir()
    token = token_for(pki)
    run(edge, "enroll", token, "--out", request, "--folder", device)
    secret = key_in(device / "kitchen.key")
    assert stat.S_IMODE((device / "kitchen.key").stat().st_mode) == 0o600
    assert token.split(".")[1] not in request.read_text()
    run(provision, "sign", request, "--pki", pki)
    run(edge, "enroll", "--install", tmp_path / "request.toml", "--folder", device)
    made = device / "kitchen.toml"
    assert [path.name for path in device.iterdir()] == ["kitchen.toml"]
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert read_identity(made).name == "kitchen" and key_in(made) == secret
    table = read_table(made)
    assert (table["run"], table["broker"]) == ("orchard", "mqtts://localhost")
    others = [path.read_text() for path in (*pki.rglob("*"), request, tmp_path / "request.toml") if path.is_file()]
    assert not any(line in text for text in others for line in secret.splitlines()[1:-1])
    run(provision, "--pki", pki, "--revoke", "kitchen")  # as any other device


@pytest.fixture
def address(enrollment: Enrollment) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    with serve(enrollment, address, lambda line: None):
        yield address


def test_a_device_without_the_ca_trusts_the_one_of_its_token(pki: Path, tmp_path: Path, address: str) -> None:
    run(edge, "enroll", token_for(pki), "--authority", address, "--folder", tmp_path)
    assert read_identity(tmp_path / "kitchen.toml").name == "kitchen"
    other = Token.make("kitchen", make_authority("another fleet").certificate_pem)
    with pytest.raises(ConfigError, match=r"has another CA than the token names; check --authority"):
        run(edge, "enroll", other, "--authority", address, "--folder", pki)
    with pytest.raises(RunError, match=r"no answer from the authority at .* \(its certificate is not that of"):
        request_certificate(address, "", make_authority("another fleet").certificate_pem)


def test_a_refusal_over_https_is_one_line_and_too_many_requests_wait(pki: Path, tmp_path: Path, address: str) -> None:
    token = token_for(pki)
    run(edge, "enroll", token, "--authority", address, "--folder", tmp_path)
    (tmp_path / "kitchen.toml").unlink()
    with pytest.raises(ConfigError, match=rf"{address} refuses the request: the token of kitchen was used on"):
        run(edge, "enroll", token, "--authority", address, "--folder", tmp_path)
    authority = fetch_authority(address, Token.parse(token).fingerprint)
    with pytest.raises(RunError, match="HTTP 413"):
        request_certificate(address, "x" * (MAX_REQUEST_BYTES + 1), authority)  # the server reads all of it
    with pytest.raises(RunError, match="HTTP 429"):
        for _ in range(BURST + 1):
            with pytest.raises(ConfigError):
                request_certificate(address, "no request", authority)


def test_a_lost_answer_can_be_asked_for_again(enrollment: Enrollment) -> None:
    token = enrollment.make_token("kitchen", DAY)
    request = first_request(new_key(), token).encode()
    assert enrollment.answer(request) == enrollment.answer(request)
    assert len(serials_of(enrollment.fleet.issued("kitchen").read_bytes())) == 1


def test_a_request_without_its_token_is_refused(enrollment: Enrollment) -> None:
    token, wrong = (
        enrollment.make_token("kitchen", DAY, NOW),
        Token.make("kitchen", enrollment.fleet.authority().certificate_pem),
    )
    ask = enrollment.answer
    renamed = Token("balcony", token.secret, token.fingerprint)
    good = first_request(new_key(), token)
    for request, when, says in (
        (first_request(new_key(), wrong), NOW, "is not the present one of kitchen: mistyped, revoked or replaced"),
        (first_request(new_key(), renamed), NOW, "the request is for balcony, but its token is for kitchen"),
        (good, NOW + 2 * DAY, "the token of kitchen expired on"),
        (renewal_request(new_key(), "kitchen", new_key()), NOW, "kitchen has no valid certificate"),
        (first_request(new_key(), Token("server", token.secret, token.fingerprint)), NOW, "'server' is reserved"),
        ("no PEM", NOW, "this is no certificate request in PEM"),
        (good[:200], NOW, "this is no certificate request in PEM"),
    ):
        with pytest.raises(ConfigError, match=says):
            ask(request.encode(), when)
    assert not (enrollment.fleet.folder / "issued" / "kitchen.crt").exists()
    ask(good.encode(), NOW)
    with pytest.raises(ConfigError, match="the token of kitchen was used on"):
        ask(first_request(new_key(), token).encode(), NOW)
    with pytest.raises(ConfigError, match=r"kitchen\.crt already exists and is not overwritten"):
        enrollment.make_token("kitchen", DAY)


def test_a_changed_request_has_no_valid_signature(enrollment: Enrollment) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    request = first_request(new_key(), enrollment.make_token("kitchen", DAY))
    der = bytearray(x509.load_pem_x509_csr(request.encode()).public_bytes(Encoding.DER))
    der[der.index(b"kitchen")] = ord("K")
    changed = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    with pytest.raises(ConfigError, match="the request's signature is not that of its key"):
        Request.parse(changed)


def test_a_name_that_was_taken_after_its_token_was_made_is_refused(pki: Path, enrollment: Enrollment) -> None:
    token = enrollment.make_token("kitchen", DAY)
    run(provision, "--pki", pki, "kitchen")
    with pytest.raises(ConfigError, match="already exists and is not overwritten; --renew or --revoke kitchen first"):
        enrollment.answer(first_request(new_key(), token).encode())


def test_a_token_that_was_not_used_can_be_withdrawn(pki: Path, enrollment: Enrollment) -> None:
    token = enrollment.make_token("kitchen", DAY)
    assert "the token of kitchen is no longer valid" in run(provision, "--pki", pki, "--revoke", "kitchen")
    with pytest.raises(ConfigError, match="is not the present one of kitchen"):
        enrollment.answer(first_request(new_key(), token).encode())
    with pytest.raises(ConfigError, match="cannot revoke kitchen: it is revoked already or was never made"):
        run(provision, "--pki", pki, "--revoke", "kitchen")


def test_a_server_without_its_ca_keeps_its_certificate(enrollment: Enrollment, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    contexts = Contexts(enrollment.fleet, "localhost", lines.append)
    before = contexts.current()
    monkeypatch.setattr("time.time", lambda: 2e10)
    (enrollment.fleet.folder / "ca.key").unlink()
    assert contexts.current() is before and contexts.current() is before
    assert len(lines) == 1 and "is not renewed" in lines[0] and "trying again in a day" in lines[0]


def test_the_present_key_asks_for_the_certificate_of_the_next(enrollment: Enrollment) -> None:
    present, later = new_key(), NOW + timedelta(days=IDENTITY_DAYS * 2 / 3)
    first(enrollment, present)
    key = new_key()
    request = renewal_request(key, "kitchen", present).encode()
    with pytest.raises(ConfigError, match=r"can be renewed from .* on, in the second half of its life"):
        enrollment.answer(request)
    name, answer = enrollment.answer(request, later)
    assert name == "kitchen" and enrollment.answer(request, later) == (name, answer)
    for stolen, says in (
        (renewal_request(new_key(), "kitchen", new_key()), "not signed with the key of a valid certificate of kitchen"),
        (renewal_request(new_key(), "balcony", present), "balcony has no valid certificate"),
    ):
        with pytest.raises(ConfigError, match=says):
            enrollment.answer(stolen.encode(), later)
    with pytest.raises(ConfigError, match=f"{MOST_VALID} valid certificates already"):
        for _ in range(MOST_VALID):
            enrollment.answer(renewal_request(new_key(), "kitchen", present).encode(), later)


def test_a_renewal_by_hand_takes_the_devices_file_for_a_token(enrollment: Enrollment, tmp_path: Path) -> None:
    key, path = new_key(), tmp_path / "installed.toml"
    path.write_text(key + first(enrollment, key, now=NOW - timedelta(days=IDENTITY_DAYS * 2 // 3)))
    path.chmod(0o600)
    run(edge, "enroll", "--renew", path, "--out", tmp_path / "request.pem", "--folder", tmp_path)
    run(provision, "sign", tmp_path / "request.pem", "--pki", enrollment.fleet.folder)
    run(edge, "enroll", "--install", tmp_path / "request.toml", "--folder", tmp_path)
    before, after = read_identity(path), read_identity(tmp_path / "kitchen.toml")
    assert before.name == after.name and before.valid and after.valid and after.valid[1] > before.valid[1]
    assert key_in(tmp_path / "kitchen.toml") != key_in(path)


def test_a_revoked_device_gets_no_other_certificate(pki: Path, enrollment: Enrollment) -> None:
    key, later = new_key(), NOW + timedelta(days=IDENTITY_DAYS * 2 / 3)
    token = enrollment.make_token("kitchen", DAY, NOW)
    request = first_request(key, token).encode()
    enrollment.answer(request, NOW)
    issued = enrollment.fleet.issued("kitchen").read_bytes()
    run(provision, "--pki", pki, "--revoke", "kitchen")
    renewal = renewal_request(new_key(), "kitchen", key).encode()
    for asked in (request, renewal):
        with pytest.raises(ConfigError, match=r"was revoked|not the present one"):
            enrollment.answer(asked, later)
    enrollment.fleet.issued("kitchen").write_bytes(issued)  # the revocation was interrupted after the list
    with pytest.raises(ConfigError, match="kitchen has no valid certificate: it was revoked"):
        enrollment.answer(renewal, later)


def test_an_expired_certificate_cannot_be_renewed(enrollment: Enrollment) -> None:
    key = new_key()
    first(enrollment, key)
    with pytest.raises(ConfigError, match="it was revoked, has expired, or never had one; make a token"):
        enrollment.answer(renewal_request(new_key(), "kitchen", key).encode(), NOW + timedelta(days=IDENTITY_DAYS))


def test_an_answer_for_another_key_is_not_installed(pki: Path, enrollment: Enrollment, tmp_path: Path) -> None:
    token = enrollment.make_token("kitchen", DAY)
    run(edge, "enroll", token, "--out", tmp_path / "request.pem", "--folder", tmp_path)
    answer = tmp_path / "answer.toml"
    answer.write_text(enrollment.answer(first_request(new_key(), token).encode())[1])
    before = (tmp_path / "kitchen.key").read_bytes()
    with pytest.raises(ConfigError, match="the answer is for another key than this device's"):
        run(edge, "enroll", "--install", answer, "--folder", tmp_path)
    answer.write_text(answer.read_text()[:900])
    with pytest.raises(ConfigError, match="has not the two certificates of a device and its CA"):
        run(edge, "enroll", "--install", answer, "--folder", tmp_path)
    assert (tmp_path / "kitchen.key").read_bytes() == before and not (tmp_path / "kitchen.toml").exists()


def test_an_answer_that_sets_more_than_an_authority_does_is_not_installed(
    enrollment: Enrollment, tmp_path: Path
) -> None:
    token = enrollment.make_token("kitchen", DAY)
    run(edge, "enroll", token, "--out", tmp_path / "request.pem", "--folder", tmp_path)
    answer = tmp_path / "answer.toml"
    text = enrollment.answer((tmp_path / "request.pem").read_bytes())[1]
    answer.write_text(f"insecure = true\n{text}")
    with pytest.raises(ConfigError, match="the answer sets insecure, which no authority does"):
        run(edge, "enroll", "--install", answer, "--folder", tmp_path)
    answer.write_text(text)
    run(edge, "enroll", "--install", answer, "--folder", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "pass one of --authority HOST:PORT, --out REQUEST and --install ANSWER"),
        (("x", "--out", "a", "--install", "b"), "pass one of"),
        (("--out", "a"), "pass either what python -m devices.provision token NAME printed, or --renew"),
        (("x", "--renew", "y", "--out", "a"), "pass either what"),
        (("kitchen." + "a" * 22 + "." + "b" * 43, "--authority", "x"), "'x' is not HOST:PORT"),
        (("kitchen.abc.def", "--out", "a"), "the token is not of the form NAME.SECRET.FINGERPRINT"),
        (("--install", "missing.toml"), "missing.toml does not exist"),
    ],
)
def test_wrong_arguments_of_enroll_are_named(arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(edge, "enroll", *arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("token", "server"), "device name 'server' is reserved"),
        (("token", "a/b"), "device name 'a/b' is invalid"),
        (("sign", "missing.pem"), "missing.pem does not exist"),
        (("serve", "0.0.0.0:8444"), "devices cannot reach 0.0.0.0; give a name or an address of this machine"),
        (("serve", "münchen.example:8444"), "ADDRESS münchen.example: .*; pass a host's name or address"),
        (("serve", "localhost"), "is not HOST:PORT"),
    ],
)
def test_wrong_arguments_of_provision_are_named(pki: Path, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(provision, *arguments, "--pki", pki)


def test_a_persons_key_gets_no_certificate_of_a_device(pki: Path, enrollment: Enrollment) -> None:
    run(provision, "--pki", pki, "--operator", "anna")
    request = renewal_request(new_key(), "anna", key_in(pki / "operators" / "anna.pem"))
    with pytest.raises(ConfigError, match="device name 'anna' is reserved"):
        enrollment.answer(request.encode(), NOW + timedelta(days=IDENTITY_DAYS * 2 / 3))


def test_the_authority_reaches_devices_that_are_added_later(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr("signal.pause", lambda: None)
    assert address in run(provision, "serve", address, "--pki", pki)
    run(provision, "--pki", pki, "kitchen")
    settings = read_settings(Settings, pki / "devices" / "kitchen.toml", {"images": "photos"}, environment=False)
    assert settings.authority == address


def test_a_broker_with_passwords_has_no_tokens(tmp_path: Path) -> None:
    run(provision, "--pki", tmp_path, "--host", "localhost", "--user")
    with pytest.raises(ConfigError, match="uses passwords, so devices have no keys; add them with --user"):
        token_for(tmp_path)
