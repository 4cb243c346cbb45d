"""python -m devices.provision: makes a fleet's CA, broker kit and identities, renews and revokes identities.

The files that it writes are listed in `devices.provisioning.fleet`.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import typer

from devices.provisioning.fleet import RESERVED, Fleet
from fedfmsl.common.cli import application, console
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.topics import ROOT, check_name

app = application()


@app.command()
def provision(
    names: list[str] = typer.Argument(None, metavar="[DEVICE]...", help="Devices to make identities for."),
    pki: Path = typer.Option(Path("pki"), help="Folder of the CA."),
    host: list[str] = typer.Option([], help="Name or address of broker and server. Makes the CA."),
    run: str | None = typer.Option(None, help="The devices' run. It is kept for devices that are added later."),
    broker: str | None = typer.Option(
        None,
        help="The broker's address for devices. It is kept for devices that are added later. "
        "With --host, the kit's broker listens on its port. Default: the first --host, like mqtts://fleet.example.",
    ),
    topic_prefix: str | None = typer.Option(
        None,
        help="First levels of all topics, for a broker with several tenants. It is kept for devices that are added "
        f"later. Give it to the server too. Default: {ROOT}.",
    ),
    operator: list[str] = typer.Option(
        [], metavar="NAME", help="Person to make a certificate for, which opens the server's console. Repeatable."
    ),
    user: bool = typer.Option(False, "--user", help="Passwords instead of certificates; connections still use TLS."),
    renew: list[str] = typer.Option(
        [],
        metavar="NAME",
        help="Make a new certificate of a device, server, operator or broker. The earlier one stays valid. Repeatable.",
    ),
    revoke: list[str] = typer.Option(
        [],
        metavar="NAME",
        help="Revoke a device's identity or password, or the identity of server or operator. Repeatable.",
    ),
    kit: Path | None = typer.Option(
        None,
        help="Where the kit will be on the broker's machine: mosquitto.conf names its files by this folder. "
        "Default: PKI/broker on this machine.",
    ),
) -> None:
    """With --host: make the CA and the broker's kit. With names: make devices' identities. With --operator: make
    certificates for persons. With --renew: make new certificates. With --revoke: revoke identities."""
    for name in (*(names or ()), *operator, *renew, *revoke):
        check_name("device", name)
    if renew and revoke:
        raise ConfigError("--renew and --revoke exclude each other; call the command once for each")
    if names and (renew or revoke):
        option = "--renew" if renew else "--revoke"
        meant = " ".join(f"{option} {name}" for name in (*renew, *revoke, *names))
        raise ConfigError(
            f"{option} takes one name, and {' '.join(names)} would be a new device; write {meant}, or make new devices "
            "in a call of their own"
        )
    for name in (*(names or ()), *operator):
        if name in RESERVED:
            raise ConfigError(f"name {name!r} is the {name}'s; choose another")
    os.umask(0o077)  # most of the files are secret
    if not (names or operator or host or renew or revoke):
        raise ConfigError("nothing to do: pass --host to make a CA, names of devices, --operator, --renew or --revoke")
    fleet = Fleet(pki, partial(console.print, highlight=False))
    if not host and not fleet.exists:
        raise ConfigError(f"{pki} holds no CA; make one with --host, the broker's name")
    settings = fleet.settings(host, run, broker, topic_prefix) if host or names or renew else {}
    if host:
        fleet.create(host, (kit or pki / "broker").absolute(), user, settings)
    if names and user != fleet.has_passwords:
        kind = "passwords; add --user" if fleet.has_passwords else "certificates; omit --user"
        raise ConfigError(f"the broker of {pki} uses {kind}")
    if settings:
        fleet.store_settings(settings)
    if names:
        fleet.add(names, settings)
    if operator:
        fleet.add_operators(operator)
    if renew:
        fleet.renew(renew, settings)
    if revoke:
        fleet.revoke(revoke)


if __name__ == "__main__":
    app()
