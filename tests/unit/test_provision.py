"""Files that devices.provision writes, and its errors."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, pkcs12
from typer.testing import CliRunner

from devices.provision import app
from devices.provisioning.authority import CA_DAYS, CLIENT, hosts_of, make_authority, revoked_serials, serials_of
from devices.provisioning.broker_kit import password_line
from devices.provisioning.settings_file import read_table
from fedfmsl.errors import ConfigError
from fedfmsl.transport.address import parse_address
from fedfmsl.transport.identity import operator_of, read_identity

HOSTS = ("--host", "broker.example", "--host", "192.0.2.1")


def provision(pki: Path, *arguments: str) -> str:
    """The command's output. Raises the command's errors."""
    return CliRunner().invoke(app, ["--pki", str(pki), *arguments], catch_exceptions=False).stdout


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ca_kit_and_identities_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    provision(tmp_path / "pki", *HOSTS, "kitchen", "balcony")
    made = files(tmp_path / "pki")
    assert set(made) == {
        *("ca.crt", "ca.key", "server.pem", "operator.pem", "fedfmsl-server.service", "lock"),
        *("fleet.toml", "devices/kitchen.toml", "devices/balcony.toml", "issued/kitchen.crt", "issued/balcony.crt"),
        *("issued/server.crt", "issued/operator.crt", "issued/broker.crt"),
        *(f"broker/{name}" for name in ("mosquitto.conf", "acl", "ca.crt", "broker.crt", "broker.key", "revoked.crl")),
        *("broker/compose.yaml", "broker/limits.conf"),
    }
    modes = {stat.S_IMODE((tmp_path / "pki" / name).stat().st_mode) for name in made}
    assert modes == {0o600}
    for name in ("server", "operator"):
        assert read_identity(tmp_path / "pki" / f"{name}.pem").name == name
    assert read_identity(tmp_path / "pki" / "devices" / "kitchen.toml").name == "kitchen"


def test_a_topic_prefix_reaches_the_access_rules_and_every_device(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "--run", "orchard", "--topic-prefix", "tenant-7/fedfmsl", "kitchen")
    provision(pki, "balcony")
    rules = (pki / "broker" / "acl").read_text()
    assert "pattern write tenant-7/fedfmsl/+/devices/%u/status\n" in rules
    assert " fedfmsl/" not in rules
    assert '"--topic-prefix", "tenant-7/fedfmsl"' in (pki / "broker" / "compose.yaml").read_text()
    for name in ("kitchen", "balcony"):
        assert read_table(pki / "devices" / f"{name}.toml")["topic_prefix"] == "tenant-7/fedfmsl"
    with pytest.raises(ConfigError, match=r"access rules are for tenant-7/fedfmsl; .* in another --pki"):
        provision(pki, "cellar", "--topic-prefix", "other")
    with pytest.raises(ConfigError, match="topic prefix 'a b' is invalid"):
        provision(tmp_path / "new", *HOSTS, "--topic-prefix", "a b")


def test_the_port_of_the_brokers_address_reaches_the_kit_and_every_device(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "--broker", "mqtts://broker.example:9883", "kitchen")
    assert "\nlistener 9883\n" in (pki / "broker" / "mosquitto.conf").read_text()
    compose = (pki / "broker" / "compose.yaml").read_text()
    assert 'ports: ["9883:9883"]' in compose and '"mqtts://broker.example:9883"' in compose
    assert read_table(pki / "devices" / "kitchen.toml")["broker"] == "mqtts://broker.example:9883"
    provision(tmp_path / "web", *HOSTS, "--broker", "wss://broker.example")  # through a proxy, for example
    assert "\nlistener 8883\n" in (tmp_path / "web" / "broker" / "mosquitto.conf").read_text()


def test_certificates_of_broker_and_server_name_every_host(tmp_path: Path) -> None:
    provision(tmp_path / "pki", *HOSTS)
    for name in ("broker/broker.crt", "server.pem"):
        command = ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", str(tmp_path / "pki" / name)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "DNS:broker.example, IP Address:192.0.2.1" in shown


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "kitchen")
    (pki / "devices" / "kitchen.toml").unlink()  # moved to the device
    before = files(pki)
    with pytest.raises(ConfigError, match=r"kitchen.* already exists and is not overwritten"):
        provision(pki, "kitchen")
    with pytest.raises(ConfigError, match="already holds a CA"):
        provision(pki, *HOSTS)
    assert files(pki) == before


def test_a_revoked_name_can_be_used_again(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "kitchen", "balcony")
    for _ in range(2):
        provision(pki, "--revoke", "kitchen")
        assert not (pki / "devices" / "kitchen.toml").exists()
        provision(pki, "kitchen")
    command = ["openssl", "crl", "-noout", "-text", "-in", str(pki / "broker" / "revoked.crl")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("Serial Number") == 2


def test_renewed_certificates_replace_the_files_and_the_earlier_ones_can_be_revoked(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "--run", "orchard", "kitchen")
    before = files(pki)
    provision(pki, "--renew", "kitchen", "--renew", "server", "--renew", "operator", "--renew", "broker")
    after = files(pki)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {
        *("devices/kitchen.toml", "server.pem", "operator.pem", "broker/broker.crt", "broker/broker.key"),
        *(f"issued/{name}.crt" for name in ("kitchen", "server", "operator", "broker")),
    }
    assert read_table(pki / "devices" / "kitchen.toml")["run"] == "orchard"
    assert hosts_of(after["broker/broker.crt"]) == ["broker.example", "192.0.2.1"]
    provision(pki, "--revoke", "kitchen", "--revoke", "server")
    revoked = revoked_serials((pki / "broker" / "revoked.crl").read_bytes())
    for name in ("kitchen", "server"):
        both = serials_of(after[f"issued/{name}.crt"])
        assert len(both) == 2 and set(both) <= set(revoked)
    provision(pki, "--renew", "server")
    assert not set(serials_of((pki / "issued" / "server.crt").read_bytes())) & set(revoked)
    for arguments, says in (
        (("--renew", "cellar"), "valid names are those in"),
        (("--revoke", "broker"), "make a new CA with --host in another --pki"),
    ):
        with pytest.raises(ConfigError, match=says):
            provision(pki, *arguments)


@pytest.mark.parametrize(
    ("kind", "changes", "changed"),
    [
        ((), ("--revoke", "kitchen"), ("broker/revoked.crl",)),
        ((), ("--renew", "broker", "--renew", "server"), ("broker/broker.crt", "broker/broker.key", "server.pem")),
        (("--user",), ("--user", "garden"), ("broker/passwords",)),
    ],
    ids=["revocation", "renewal", "password"],
)
def test_a_broker_that_uses_the_kit_in_place_can_still_read_it_after_a_change(
    tmp_path: Path, kind: tuple[str, ...], changes: tuple[str, ...], changed: tuple[str, ...]
) -> None:
    """With a list that it cannot read, mosquitto lets a revoked device in, and does not start again."""
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, *kind, "kitchen")
    paths = [pki / name for name in changed]
    for path in paths:
        path.chmod(0o640)
        if os.geteuid() == 0:
            os.chown(path, 1883, 1884)
    before = [(found.st_uid, found.st_gid, found.st_mode) for found in map(os.stat, paths)]
    contents = [path.read_bytes() for path in paths]
    provision(pki, *changes)
    assert [(found.st_uid, found.st_gid, found.st_mode) for found in map(os.stat, paths)] == before
    assert all(path.read_bytes() != content for path, content in zip(paths, contents, strict=True))


@pytest.mark.parametrize("kind", [(), ("--user",)], ids=["certificates", "passwords"])
def test_operators_have_files_for_console_and_browser_that_can_be_revoked(
    tmp_path: Path, kind: tuple[str, ...]
) -> None:
    pki = tmp_path / "pki"
    printed = " ".join(provision(pki, *HOSTS, *kind, "--operator", "anna").split())
    found = re.search(r"anna\.p12; import it in anna's browser, with the password (\S+)", printed)
    assert found
    loaded = pkcs12.load_pkcs12((pki / "operators" / "anna.p12").read_bytes(), found[1].encode())
    assert loaded.cert and operator_of(loaded.cert.certificate.public_bytes(Encoding.DER)) == "anna"
    assert read_identity(pki / "operators" / "anna.pem").name == "operator"  # for the broker
    assert (pki / "operators" / "anna.p12").stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="already exists"):
        provision(pki, "--operator", "anna")
    provision(pki, "--renew", "anna")
    serials = serials_of((pki / "issued" / "anna.crt").read_bytes())
    printed = provision(pki, "--revoke", "anna", "--revoke", "operator")
    assert "copy it to the server" in " ".join(printed.split())
    assert len(serials) == 2 and set(serials) < set(revoked_serials((pki / "broker" / "revoked.crl").read_bytes()))
    assert not list((pki / "operators").iterdir())


def test_no_certificate_is_valid_longer_than_its_ca() -> None:
    authority = make_authority("old", now=datetime.now(timezone.utc) - timedelta(days=CA_DAYS - 30))
    assert authority.issue("x", [CLIENT]).certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "nothing to do"),
        (("kitchen",), "holds no CA; make one with --host"),
        (("--host", "-not a host-é"), "no valid host name or address"),
        ((*HOSTS, "--host", "-not a host-é"), "pass a host's name or address"),
        ((*HOSTS, "server"), "is the server's; choose another"),
        ((*HOSTS, "--broker", "mqtt://broker.example"), "speaks TLS only"),
        ((*HOSTS, "--broker", "broker.example"), "not of the form"),
        ((*HOSTS, "--run", "a/b"), "run name 'a/b' is invalid"),
        ((*HOSTS, "a/b"), "is invalid"),
        ((*HOSTS, "+"), "is invalid"),
        (("--revoke", "../ca"), "is invalid"),
        (
            ("--revoke", "kitchen", "balcony"),
            "would be a new device; write --revoke kitchen --revoke balcony, or",
        ),
        (("--renew", "server", "broker"), "--renew takes one name, .*; write --renew server --renew broker, or"),
        (("--renew", "kitchen", "--revoke", "balcony"), "--renew and --revoke exclude each other"),
        ((*HOSTS, "broker"), "is the broker's; choose another"),
        ((*HOSTS, "--operator", "server"), "is the server's; choose another"),
        ((*HOSTS, "--operator", "homeassistant"), "is the homeassistant's; choose another"),
    ],
)
def test_invalid_arguments_are_named_and_write_nothing(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        provision(tmp_path / "pki", *arguments)
    assert files(tmp_path) == {}


@pytest.mark.parametrize("kind", [(), ("--user",)])
def test_an_unknown_name_cannot_be_revoked(tmp_path: Path, kind: tuple[str, ...]) -> None:
    provision(tmp_path / "pki", *HOSTS, *kind)
    with pytest.raises(ConfigError, match="unknown"):
        provision(tmp_path / "pki", "--revoke", "unknown")


@pytest.mark.parametrize(("made", "added"), [((), ("--user",)), (("--user",), ())])
def test_a_broker_uses_either_certificates_or_passwords(
    tmp_path: Path, made: tuple[str, ...], added: tuple[str, ...]
) -> None:
    provision(tmp_path / "pki", *HOSTS, *made)
    with pytest.raises(ConfigError, match=r"uses (certificates; omit --user|passwords; add --user)"):
        provision(tmp_path / "pki", "kitchen", *added)


def test_a_password_is_printed_once_and_stored_as_a_hash(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    printed = provision(pki, *HOSTS, "--user", "kitchen", "homeassistant")
    passwords = [
        line.split()[1] for line in printed.splitlines() if line.startswith(("server ", "operator ", "homeassistant "))
    ]
    assert len(passwords) == 3
    assert all(password.encode() not in data for data in files(pki).values() for password in passwords)
    assert (pki / "broker" / "passwords").read_text().count("$7$101$") == 4  # and kitchen's
    with pytest.raises(ConfigError, match="already has kitchen"):
        provision(pki, "--user", "kitchen")
    revoked = provision(pki, "--revoke", "kitchen", "--revoke", "server")
    assert "copy it to the broker" in " ".join(revoked.split()) and "--renew server" in revoked
    assert (pki / "broker" / "passwords").read_text().count("$7$101$") == 2
    new = next(line for line in provision(pki, "--renew", "server").splitlines() if line.startswith("server "))
    assert new.split()[1] not in passwords
    assert "kitchen" not in (pki / "broker" / "passwords").read_text()
    assert not (pki / "devices" / "kitchen.toml").exists()


def test_a_devices_file_has_run_broker_and_identity(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "--run", "orchard", "kitchen")
    path = pki / "devices" / "kitchen.toml"
    settings = read_table(path)
    assert list(settings) == ["run", "broker", "identity"]
    assert (settings["run"], settings["broker"]) == ("orchard", "mqtts://broker.example")
    alone = tmp_path / "identity.pem"
    alone.write_text(settings["identity"])
    alone.chmod(0o600)
    assert read_identity(alone).name == read_identity(path).name == "kitchen"
    assert read_identity(path).authorities == read_identity(pki / "server.pem").authorities
    read_identity(path).client_context()  # OpenSSL accepts the file as well


def test_with_passwords_a_devices_file_has_its_name_and_password(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    printed = provision(pki, "--host", "2001:db8::1", "--user", "--run", "orchard", "kitchen")
    settings = read_table(pki / "devices" / "kitchen.toml")
    address = parse_address(settings["broker"])
    assert (address.host, address.port, address.user, settings["device"]) == ("2001:db8::1", 8883, "kitchen", "kitchen")
    assert len(address.password) >= 32 and address.password not in printed
    assert "PRIVATE KEY" not in settings["identity"]


def test_run_and_broker_are_stored_for_later_devices(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "first")
    assert "run" not in read_table(pki / "devices" / "first.toml")
    provision(pki, "--run", "orchard", "--broker", "wss://broker.example/mqtt", "second")
    provision(pki, "third")
    second, third = (read_table(pki / "devices" / f"{name}.toml") for name in ("second", "third"))
    assert (third["run"], third["broker"]) == (second["run"], second["broker"])
    assert (third["run"], third["broker"]) == ("orchard", "wss://broker.example/mqtt")


def test_home_assistant_gets_certificate_and_key_in_two_files(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "homeassistant")
    command = ["openssl", "verify", "-CAfile", str(pki / "ca.crt"), str(pki / "homeassistant.crt")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert "PRIVATE KEY" in (pki / "homeassistant.key").read_text()
    assert not (pki / "devices" / "homeassistant.toml").exists()
    provision(pki, "--revoke", "homeassistant")
    assert not list(pki.glob("homeassistant.*"))


def test_revoking_a_device_named_like_a_file_of_the_ca_deletes_only_its_own_files(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    provision(pki, *HOSTS, "ca", "fleet")
    before = set(files(pki))
    provision(pki, "--revoke", "ca", "--revoke", "fleet")
    gone = before - set(files(pki))
    assert gone == {"devices/ca.toml", "devices/fleet.toml", "issued/ca.crt", "issued/fleet.crt"}


def test_hashes_of_the_same_password_differ() -> None:
    assert password_line("a", "secret").partition(":")[2] != password_line("b", "secret").partition(":")[2]
