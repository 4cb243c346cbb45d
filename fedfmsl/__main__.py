"""fedfmsl, or python -m fedfmsl: one command for all parts. A part is imported when its subcommand is used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import fedfmsl
from fedfmsl.common.cli import application
from fedfmsl.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """Where a subcommand is: a module with a typer application `app`, or one command of that application."""

    module: str
    extra: str  # the extra that installs its dependencies
    help: str
    command: str = ""


PARTS = {
    "export": Part("export.__main__", "export", "Export a backbone; move a global expert to and from the hub."),
    "server": Part(
        "trainer_server.__main__", "server", "Coordinate a federated run: both stages of FedFMSL, over MQTT."
    ),
    "edge": Part("edge_runtime.__main__", "edge", "Adapt a foundation model to the images or texts of this device."),
    "predict": Part(
        "edge_runtime.__main__", "edge", "Classify images or texts with a personalized model.", command="predict"
    ),
    "provision": Part(
        "devices.provision", "server", "Make a CA, a broker's configuration and identities; revoke them."
    ),
    "install": Part("devices.install", "edge", "Install the daemon on this machine, or remove it."),
    "simulate": Part("simulation.__main__", "simulation", "Simulate a federation of virtual devices on this machine."),
    "trial": Part("devices.trial.__main__", "trial", "Run a whole federated trial on this machine."),
}


class PartsGroup(TyperGroup):
    """Lists the parts without importing them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(PARTS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A placeholder with the help text."""
        return TyperCommand(cmd_name, help=PARTS[cmd_name].help) if cmd_name in PARTS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in PARTS else command, rest


def load(name: str) -> Any:
    """The command of a part. Raises ConfigError if its dependencies are not installed."""
    part = PARTS[name]
    try:
        command: Any = typer.main.get_command(import_module(part.module).app)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"fedfmsl {name} needs the package {error.name!r}; pip install 'fedfmsl-edge[{part.extra}]'"
        ) from error
    command = command.commands[part.command] if part.command else command
    command.help = command.help or part.help
    return command


app = application(
    "Federated LoRA adaptation of foundation models on edge devices.",
    cls=PartsGroup,
    add_completion=True,
    no_args_is_help=True,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(fedfmsl.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None: ...


if __name__ == "__main__":
    app(prog_name="fedfmsl")
