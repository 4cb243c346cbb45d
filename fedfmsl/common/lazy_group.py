"""A group of commands whose modules are imported when a command is used: `--help` of the group starts quickly."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fedfmsl.common.cli import application
from fedfmsl.errors import ConfigError


@dataclass(frozen=True)
class LazyCommand:
    """Where a command is: a module with a typer application `app`, or one command of that application."""

    module: str
    extra: str  # the extra that installs its dependencies
    help: str  # as in its module, up to the first empty line
    command: str = ""
    hidden: bool = False


class LazyGroup(TyperGroup):
    """Lists its commands without importing them."""

    lazy: Mapping[str, LazyCommand] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A placeholder with the help text."""
        found = self.lazy.get(cmd_name)
        return found and TyperCommand(cmd_name, help=found.help, hidden=found.hidden)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, self.load(name, f"{ctx.command_path} {name}") if name else command, rest

    def load(self, name: str, path: str) -> Any:
        """The command `name`. `path`: how the user calls it, for the error.

        Raises ConfigError if its dependencies are not installed.
        """
        lazy = self.lazy[name]
        try:
            command: Any = typer.main.get_command(import_module(lazy.module).app)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{path} needs the package {error.name!r}; pip install 'fedfmsl-edge[{lazy.extra}]'"
            ) from error
        command = commands_of(command)[lazy.command] if lazy.command else command
        command.help = command.help or lazy.help
        return command


def commands_in(
    module: str, extra: str, helps: Mapping[str, str], hidden: Collection[str] = ()
) -> dict[str, LazyCommand]:
    """Commands of one application, by their names. `helps`: the help of each."""
    return {name: LazyCommand(module, extra, text, name, name in hidden) for name, text in helps.items()}


def lazy_group(
    help_text: str, lazy: Mapping[str, LazyCommand], kind: type[LazyGroup] = LazyGroup, **options: Any
) -> typer.Typer:
    """An application with these commands."""
    named = type(kind.__name__, (kind,), {"lazy": lazy})
    # Without a callback typer makes no group of an application that has no commands of its own.
    return application(help_text, **{"cls": named, "callback": lambda: None, **options})


def commands_of(command: Any) -> dict[str, Any]:
    """The subcommands of a command, imported; none if it is not a group."""
    if isinstance(command, LazyGroup):
        return {name: command.load(name, name) for name in command.lazy}
    return getattr(command, "commands", {})
