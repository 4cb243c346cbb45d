"""python -m devices.provision: who may take part. Makes a CA, a broker's kit and identities, and takes them back.

PKI/ca.key              signs; keep it off the broker and the devices
PKI/server.pem          the run's server (--identity)
PKI/devices/NAME.pem    a device's (--identity): move it there
PKI/issued/NAME.crt     what can be taken back
PKI/broker/             the kit: copy it to the broker
"""

from __future__ import annotations

import os
from pathlib import Path

import typer

from devices.authority import (
    CLIENT,
    SERVER,
    Authority,
    Issued,
    load_authority,
    make_authority,
    revoked_serials,
    serial_of,
)
from devices.broker_kit import SERVER as SERVER_NAME
from devices.broker_kit import acl, mosquitto_conf, new_password, password_line
from protocol.errors import ConfigError
from protocol.topics import check_name
from shell.cli import application, console
from shell.files import write_atomically

app = application("Make a CA, a broker's configuration and devices' identities; revoke them.")


@app.command()
def provision(
    names: list[str] = typer.Argument(None, metavar="[DEVICE]...", help="Devices to make identities for."),
    pki: Path = typer.Option(Path("pki"), help="Folder of the CA."),
    host: list[str] = typer.Option([], help="A name or address that broker and server are reached by; makes the CA."),
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
    if host:
        _make(pki, host, (kit or pki / "broker").absolute(), user)
    elif not (pki / "ca.key").is_file():
        raise ConfigError(f"{pki} holds no CA; make one with --host, the broker's name")
    broker = pki / "broker"
    passwords = broker / "passwords" if (broker / "passwords").is_file() else None
    if names and user != (passwords is not None):
        kind = "users and passwords; say --user" if passwords else "certificates; leave --user away"
        raise ConfigError(f"the broker of {pki} asks for {kind}")
    if passwords:
        _add_users(passwords, names or [])
        _drop_users(passwords, revoke)
    else:
        authority = _load(pki)
        for name in names or []:
            issued = authority.issue(name, [CLIENT])
            _write(pki / "issued" / f"{name}.crt", issued.certificate_pem)  # first: nothing leaves that is not in it
            _write_identity(pki / "devices" / f"{name}.pem", issued, authority)
        _revoke(pki, authority, revoke)


def _make(pki: Path, hosts: list[str], kit: Path, user: bool) -> None:
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
    # the server also serves the bundle over HTTPS, under the same names
    _write_identity(pki / "server.pem", authority.issue(SERVER_NAME, [SERVER, CLIENT], hosts), authority)
    if user:
        _write(broker / "passwords", "")
        _add_users(broker / "passwords", [SERVER_NAME])
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
        (pki / "devices" / f"{name}.pem").unlink(missing_ok=True)
    console.print(f"wrote {path}; copy it to the broker and restart that, which also cuts off who is in")


def _add_users(path: Path, names: list[str]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    known = {line.partition(":")[0] for line in lines}
    if taken := known & set(names):
        raise ConfigError(f"{path} already has {', '.join(sorted(taken))}; --revoke first, or choose another name")
    for name in names:
        password = new_password()
        lines.append(password_line(name, password))
        console.print(f"{name} {password}", highlight=False)
    _replace_users(path, lines)


def _drop_users(path: Path, names: list[str]) -> None:
    lines = path.read_text().splitlines(keepends=True)
    if missing := set(names) - {line.partition(":")[0] for line in lines}:
        raise ConfigError(f"{path} has no {', '.join(sorted(missing))}")
    _replace_users(path, [line for line in lines if line.partition(":")[0] not in names])


def _replace_users(path: Path, lines: list[str]) -> None:
    write_atomically(path, "".join(lines).encode(), durable=True)


def _write_identity(path: Path, issued: Issued, authority: Authority) -> None:
    _write(path, issued.key_pem + issued.certificate_pem + authority.certificate_pem)


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
