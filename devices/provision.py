"""python -m devices.provision: makes a fleet's CA, broker kit and identities, renews and revokes identities.

The files that it writes are listed in `devices.provisioning.fleet`. `members` is the command if none is named, so that
`python -m devices.provision kitchen` makes an identity.
"""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from devices.provisioning.enrollment import Enrollment
from devices.provisioning.fleet import RESERVED, Fleet
from fedfmsl.common.cli import application, console
from fedfmsl.common.files import why_no_file, write_atomically
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.topics import ROOT, check_name
from fedfmsl.transport.settings import HOME_ASSISTANT

DEFAULT = "members"
PKI = typer.Option(Path("pki"), help="Folder of the CA.")


class _Group(TyperGroup):
    """A group with a default command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] == ["--help"] else self._named(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, self._named(args))

    def _named(self, args: list[str]) -> list[str]:
        return args if args and args[0] in self.commands else [DEFAULT, *args]


app = application("Make a fleet's CA, broker kit and identities; renew and revoke them.", cls=_Group)


def _fleet(pki: Path) -> Fleet:
    os.umask(0o077)  # most of the files are secret
    fleet = Fleet(pki, partial(console.print, highlight=False))
    if not fleet.exists:
        raise ConfigError(f"{pki} holds no CA; make one with --host, the broker's name")
    return fleet


@app.command(DEFAULT)
def members(
    names: list[str] = typer.Argument(None, metavar="[DEVICE]...", help="Devices to make identities for."),
    pki: Path = PKI,
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
        help="Revoke a device's identity, password or unused token, or the identity of server or operator. Repeatable.",
    ),
    kit: Path | None = typer.Option(
        None,
        help="Where the kit will be on the broker's machine: mosquitto.conf names its files by this folder. "
        "Default: PKI/broker on this machine.",
    ),
) -> None:
    """With --host: make the CA and the broker's kit. With names: make devices' identities. With --operator: make
    certificates for persons. With --renew: make new certificates. With --revoke: revoke identities. This is the
    command if none is named."""
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
        if name in RESERVED or (name == HOME_ASSISTANT and name in operator):
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
    with fleet.locked():
        if names:
            fleet.add(names, settings)
        if operator:
            fleet.add_operators(operator)
        if renew:
            fleet.renew(renew, settings)
        if revoke:
            fleet.revoke(revoke)


@app.command()
def token(
    name: str = typer.Argument(metavar="DEVICE", help="The new device."),
    pki: Path = PKI,
    hours: float = typer.Option(24.0, min=0.01, max=8760, help="For how long the token is valid."),
) -> None:
    """Make a one-time token, with which a new device asks for the certificate of a key that it makes itself."""
    check_name("device", name)
    made = Enrollment(_fleet(pki)).make_token(name, timedelta(hours=hours))
    console.print(str(made), highlight=False)


@app.command()
def sign(
    request: Path = typer.Argument(metavar="REQUEST", help="The file that python -m edge_runtime enroll --out wrote."),
    out: Path | None = typer.Option(None, help="File to write. Default: the request's name with the suffix .toml."),
    pki: Path = PKI,
) -> None:
    """Answer a device's request: write its file without the key, which stays on the device."""
    fleet, path = _fleet(pki), out or request.with_suffix(".toml")
    if reason := why_no_file(request):
        raise ConfigError(f"{request} {reason}; pass the file that python -m edge_runtime enroll --out wrote")
    if path.exists():
        raise ConfigError(f"{path} already exists and is not overwritten; remove it, or choose another --out")
    name, answer = Enrollment(fleet).answer(request.read_bytes())
    write_atomically(path, answer.encode(), durable=True)
    fleet.report(f"wrote {path}; copy it to {name}, and run there: python -m edge_runtime enroll --install {path.name}")


@app.command()
def serve(
    address: str = typer.Argument(
        metavar="ADDRESS", help="HOST:PORT as devices reach this machine. Kept for devices that are added later."
    ),
    pki: Path = PKI,
) -> None:
    """Answer requests over HTTPS until interrupted: those with a token, and renewals of valid certificates."""
    from devices.provisioning.authority_server import serve as start  # the other commands need no web server

    fleet = _fleet(pki)
    with fleet.locked():
        settings = fleet.settings([], None, None) | {"authority": address}
    with start(Enrollment(fleet), address, fleet.report):
        fleet.store_settings(settings)
        fleet.report(f"answers requests at {address}; stop it with Ctrl-C")
        signal.pause()


if __name__ == "__main__":
    app()
