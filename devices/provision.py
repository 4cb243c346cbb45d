"""python -m devices.provision: who may take part. Makes a CA, a broker's kit and identities, and takes them back.

PKI/ca.key              signs; keep it off the broker and the devices
PKI/server.pem          the run's server (--identity)
PKI/devices/NAME.toml   a device's, with the run and the broker: carry it there, for devices.install (or as --identity)
PKI/homeassistant.crt, .key     Home Assistant's, if it is among the names
PKI/issued/NAME.crt     what can be taken back
PKI/fleet.toml          the run and the broker of devices that are still to come
PKI/broker/             the kit: copy it to the broker
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

import typer

from devices.provisioning.authority import (
    CLIENT,
    SERVER,
    Authority,
    Issued,
    load_authority,
    make_authority,
    revoked_serials,
    serial_of,
)
from devices.provisioning.broker_kit import HOME_ASSISTANT, acl, mosquitto_conf, new_password, password_line
from devices.provisioning.broker_kit import SERVER as SERVER_NAME
from devices.provisioning.compose import compose_yaml
from devices.provisioning.settings_file import read_table, settings_text
from fedfmsl.common.cli import application, console
from fedfmsl.common.files import write_atomically
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.topics import check_name
from fedfmsl.transport.address import netloc, parse_address

FLEET = "fleet.toml"
SOURCE = Path(__file__).parents[1]

app = application("Make a CA, a broker's configuration and devices' identities; revoke them.")


@app.command()
def provision(
    names: list[str] = typer.Argument(None, metavar="[DEVICE]...", help="Devices to make identities for."),
    pki: Path = typer.Option(Path("pki"), help="Folder of the CA."),
    host: list[str] = typer.Option([], help="A name or address that broker and server are reached by; makes the CA."),
    run: str | None = typer.Option(None, help="The run that devices are for. Kept for those to come."),
    broker: str | None = typer.Option(None, help="Where devices find it. Default: mqtts:// the first host. Kept."),
    user: bool = typer.Option(False, "--user", help="Users and passwords instead of certificates; TLS stays."),
    revoke: list[str] = typer.Option([], metavar="DEVICE", help="Take a device's identity or user back."),
    kit: Path | None = typer.Option(None, help="Where the kit will lie on the broker. Default: where it is made."),
) -> None:
    """With --host: make the CA and the broker's kit. With names: make devices' identities. With --revoke: take back."""
    for name in (*(names or ()), *revoke):
        check_name("device", name)
        if name == SERVER_NAME:
            raise ConfigError(f"device name {SERVER_NAME!r} is the server's; choose another")
    if names and revoke:
        raise ConfigError(f"--revoke and new devices ({', '.join(names)}) exclude each other; say --revoke before each")
    os.umask(0o077)  # most of what is written is secret
    if not (names or host or revoke):
        raise ConfigError("nothing to do: give --host to make a CA, names of devices, or --revoke a device")
    if not host and not (pki / "ca.key").is_file():
        raise ConfigError(f"{pki} holds no CA; make one with --host, the broker's name")
    fleet = _fleet(pki, host, run, broker) if host or names else {}
    if host:
        _make(pki, host, (kit or pki / "broker").absolute(), user, fleet)
    passwords = pki / "broker" / "passwords"
    if names and user != passwords.is_file():
        kind = "certificates; leave --user away" if user else "users and passwords; say --user"
        raise ConfigError(f"the broker of {pki} asks for {kind}")
    if fleet:
        write_atomically(pki / FLEET, settings_text(("What devices to come are told.", fleet)).encode(), durable=True)
    if passwords.is_file():
        _add_users(pki, names or [], fleet)
        _drop_users(pki, revoke)
    else:
        authority = _load(pki)
        for name in names or []:
            issued = authority.issue(name, [CLIENT])
            _write(pki / "issued" / f"{name}.crt", issued.certificate_pem)  # first: nothing leaves that is not in it
            if name == HOME_ASSISTANT:  # it wants them one by one
                _write(pki / f"{name}.crt", issued.certificate_pem)
                _write(pki / f"{name}.key", issued.key_pem)
            else:
                _write_device(pki, name, fleet, {"identity": _identity(issued, authority)})
        _revoke(pki, authority, revoke)


def _fleet(pki: Path, hosts: list[str], run: str | None, broker: str | None) -> dict[str, str]:
    """What devices are told: what is given, or else was before. Raises ConfigError if that is nothing usable."""
    known = read_table(pki / FLEET) if (pki / FLEET).is_file() else {}
    fleet = {"run": run or known.get("run"), "broker": broker or known.get("broker")}
    if hosts:
        fleet["broker"] = broker or f"mqtts://{netloc(hosts[0])}"
    told = {key: value for key, value in fleet.items() if value}
    if "broker" not in told:
        raise ConfigError(f"{pki} does not say where the broker is; give --broker, like mqtts://fleet.example")
    if not parse_address(told["broker"]).encrypted:
        raise ConfigError(f"--broker {broker}: the kit's broker speaks TLS only; write it as mqtts:// or wss://")
    if run:
        check_name("run", run)
    return told


def _make(pki: Path, hosts: list[str], kit: Path, user: bool, fleet: Mapping[str, str]) -> None:
    broker = pki / "broker"
    if (pki / "ca.key").exists():
        raise ConfigError(f"{pki} already holds a CA; leave --host away to add devices, or give another --pki")
    authority = make_authority("FedFMSL fleet")
    try:
        issued = authority.issue(hosts[0], [SERVER], hosts)
    except ValueError as error:
        raise ConfigError(f"--host {' '.join(hosts)}: {error}; give a host's name or address") from error
    _write(broker / "ca.crt", authority.certificate_pem)
    _write(broker / "broker.crt", issued.certificate_pem)
    _write(broker / "broker.key", issued.key_pem)
    _write(broker / "revoked.crl", authority.revocation_list([]))
    _write(broker / "acl", acl())
    _write(broker / "mosquitto.conf", mosquitto_conf(kit, user))
    _write(broker / "compose.yaml", compose_yaml(kit, hosts[0], fleet.get("run"), SOURCE))
    # the server also serves the bundle over HTTPS, under the same names
    _write(pki / "server.pem", _identity(authority.issue(SERVER_NAME, [SERVER, CLIENT], hosts), authority))
    if user:
        _write(broker / "passwords", "")
        _add_users(pki, [SERVER_NAME], fleet)
    _write(pki / "ca.crt", authority.certificate_pem)
    _write(pki / "ca.key", authority.key_pem)  # the last: without it nothing here counts as made


def _load(pki: Path) -> Authority:
    try:
        return load_authority((pki / "ca.crt").read_bytes(), (pki / "ca.key").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{pki} holds no readable CA ({error}); make one with --host in another --pki") from error


def _revoke(pki: Path, authority: Authority, names: list[str]) -> None:
    """The list is written before the certificates are forgotten. Raises ConfigError at a name that has none."""
    if not names:
        return
    path = pki / "broker" / "revoked.crl"
    certificates = [pki / "issued" / f"{name}.crt" for name in names]
    try:
        serials = [*revoked_serials(path.read_bytes()), *(serial_of(file.read_bytes()) for file in certificates)]
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"cannot revoke {', '.join(names)}: {error}; the names are those in {pki}/issued") from error
    write_atomically(path, authority.revocation_list(serials).encode(), durable=True)
    for name, file in zip(names, certificates, strict=True):
        file.unlink()
        _forget(pki, name)
    console.print(f"wrote {path}; copy it to the broker and restart that, which also cuts off who is in")


def _add_users(pki: Path, names: list[str], fleet: Mapping[str, str]) -> None:
    """A device's password stands in its file, the others' are printed."""
    path = pki / "broker" / "passwords"
    lines = path.read_text().splitlines(keepends=True)
    known = {line.partition(":")[0] for line in lines}
    if taken := known & set(names):
        raise ConfigError(f"{path} already has {', '.join(sorted(taken))}; --revoke first, or choose another name")
    for name in names:
        password = new_password()
        lines.append(password_line(name, password))
        if name in (SERVER_NAME, HOME_ASSISTANT):
            console.print(f"{name} {password}", highlight=False)
            continue
        parts = urlsplit(fleet["broker"])
        who = f"{quote(name)}:{quote(password, safe='')}@{parts.netloc.rpartition('@')[2]}"
        address = parts._replace(netloc=who).geturl()
        authority = (pki / "ca.crt").read_text()
        _write_device(pki, name, {**fleet, "broker": address}, {"device": name, "identity": authority})
    _replace_users(path, lines)


def _drop_users(pki: Path, names: list[str]) -> None:
    path = pki / "broker" / "passwords"
    lines = path.read_text().splitlines(keepends=True)
    if missing := set(names) - {line.partition(":")[0] for line in lines}:
        raise ConfigError(f"{path} has no {', '.join(sorted(missing))}")
    _replace_users(path, [line for line in lines if line.partition(":")[0] not in names])
    for name in names:
        _forget(pki, name)


def _replace_users(path: Path, lines: list[str]) -> None:
    write_atomically(path, "".join(lines).encode(), durable=True)


def _write_device(pki: Path, name: str, fleet: Mapping[str, str], own: Mapping[str, str]) -> None:
    path = pki / "devices" / f"{name}.toml"
    about = f"Who {name} is, and whom it trusts. Secret: this file belongs on {name}, and nowhere else."
    _write(path, settings_text((f"Written by devices.provision for {name}.", fleet), (about, own)))
    console.print(f"carry it to {name}, and there: python -m devices.install {path.name} --images DIR")


def _forget(pki: Path, name: str) -> None:
    own = [f"{name}.crt", f"{name}.key"] if name == HOME_ASSISTANT else [f"devices/{name}.toml"]
    for file in own:
        (pki / file).unlink(missing_ok=True)


def _identity(issued: Issued, authority: Authority) -> str:
    return issued.key_pem + issued.certificate_pem + authority.certificate_pem


def _write(path: Path, text: str) -> None:
    """Raises ConfigError if the file is there: what is out in the field must not lose its counterpart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} already exists and is not overwritten; remove it first, or choose another"
        ) from error
    console.print(f"wrote {path}")


if __name__ == "__main__":
    app()
