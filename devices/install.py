"""python -m devices.install FILE --images DIR: installs the daemon on this machine as a systemd service.

FILE is the device's file from devices.provision. Needs the `edge` extra only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from devices.provisioning import installation
from devices.provisioning.installation import ROOT, Request
from edge_runtime.settings import Settings
from fedfmsl.common.cli import application, console
from fedfmsl.common.options import with_settings
from fedfmsl.common.settings import read_settings
from fedfmsl.errors import ConfigError

app = application()


def _request(source: Path | None, flags: Mapping[str, Any]) -> Request | None:
    return Request(source, read_settings(Settings, source, flags), frozenset(flags)) if source else None


@app.command()
@with_settings(
    Settings, file=typer.Argument(None, metavar="FILE", help="The device's file from devices.provision."), read=_request
)
def install(
    request: Request | None,
    root: Path = typer.Option(ROOT, help="Only write the files, below this folder: for example a mounted SD card."),
    renew: Path | None = typer.Option(
        None, help="Only replace the identity in the installed settings by that of this file from devices.provision."
    ),
    uninstall: bool = typer.Option(False, "--uninstall", help="Remove service and settings; the state stays."),
    purge: bool = typer.Option(False, "--purge", help="With --uninstall: also remove state and user."),
) -> None:
    """Install the daemon on this machine as a service. A repeated installation replaces the settings, not the state."""
    if root == ROOT and os.geteuid() != 0:
        raise ConfigError(f"only root may install a service: sudo {sys.executable} -m devices.install …")
    if purge and (root != ROOT or not uninstall):
        raise ConfigError("--purge needs --uninstall and excludes --root")
    os.umask(0o022)
    if uninstall:
        lines = installation.uninstall(root, purge)
    elif renew is not None:
        lines = installation.renew(renew, root)
    elif request is None:
        raise ConfigError("the device's file is missing; pass the one that devices.provision wrote, like kitchen.toml")
    else:
        lines = installation.install(request, root)
    for line in lines:
        console.print(line)


if __name__ == "__main__":
    app()
