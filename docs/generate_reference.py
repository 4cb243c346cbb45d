"""Writes docs/reference.md from the code: settings, commands and exit codes.

python docs/generate_reference.py

A test compares the page with `page()`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from edge_runtime.settings import Settings
from fedfmsl import errors
from fedfmsl.common.options import reference
from trainer_server.settings import ServerSettings

PAGE = Path(__file__).with_name("reference.md")
# Module of each command's typer application, in the order of the page.
MODULES = (
    "edge_runtime.__main__",
    "trainer_server.__main__",
    "export.build",
    "devices.provision",
    "devices.install",
    "devices.boards",
    "devices.trial.__main__",
    "devices.trial.assets",
)
INTRODUCTION = """\
# Settings, commands and exit codes

This page is generated from the code: `python docs/generate_reference.py`.

A setting of a device or server has three forms: a key of its TOML file (`max_temperature`), an environment variable
(`FEDFMSL_MAX_TEMPERATURE`) and an option (`--max-temperature`). An option overrides the environment; the environment
overrides the file. Sizes are written like `512MB` or `2GB`.

User and password for the broker are in the address or in `FEDFMSL_USER` and `FEDFMSL_PASSWORD`.

## Exit codes

A command that fails prints one line per error to stderr: value, place and remedy. A command stopped by a signal exits with
128 plus the signal's number.

| code | error | cause |
|---|---|---|
"""
CAUSES = {
    errors.ConfigError: "an option or setting has an invalid value",
    errors.InputError: "images, texts, folders or class names cannot be used",
    errors.BundleError: "a bundle is missing, changed, or of another model",
    errors.WeightsError: "model weights cannot be found, downloaded or recognised",
    errors.BrokerError: "the MQTT broker is unreachable or refuses the client",
    errors.MessageError: "a message does not match the protocol; it is refused and never ends a process",
    errors.RunError: "a run cannot continue: too few devices, or a process that ended early",
}


def page() -> str:
    codes = [f"| {error.exit_code} | `{error.__name__}` | {cause} |" for error, cause in CAUSES.items()]
    codes.append(f"| {os.EX_IOERR} | | the disk is full |")
    device = ("", "## Settings of a device", "", reference(Settings, level=3))
    server = ("", "## Settings of the server", "", reference(ServerSettings, level=3))
    return INTRODUCTION + "\n".join([*codes, *device, *server, *commands()]) + "\n"


def commands() -> Iterator[str]:
    for module in MODULES:
        name = f"python -m {module.removesuffix('.__main__')}"
        command = typer.main.get_command(importlib.import_module(module).app)
        yield from ("", f"## {name}", "", _sentences(command.help))
        subcommands: dict[str, Any] = getattr(command, "commands", {})
        for title, one in subcommands.items():
            if not one.hidden:
                yield from ("", f"### {name} {title}", "", _sentences(one.help), *_options(one))
        if not subcommands:
            yield from _options(command)


def _options(command: Any) -> Iterator[str]:
    """A Markdown table of a command's parameters."""
    settings = [parameter for parameter in command.params if "\\[env var: FEDFMSL_" in (parameter.help or "")]
    if settings:
        yield from ("", "Settings, see above: " + ", ".join(f"`{one.opts[0]}`" for one in settings) + ".")
    rows = [_row(one) for one in command.params if one.name != "help" and one not in settings]
    if rows:
        yield from ("", "| option | default | meaning |", "|---|---|---|", *rows)


def _row(parameter: Any) -> str:
    argument = parameter.param_type_name == "argument"
    names = [(parameter.name or "").upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
    default = "required" if parameter.required else _default(parameter.default)
    cells = (", ".join(f"`{name}`" for name in names), default, _sentences(parameter.help).replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"


def _default(value: Any) -> str:
    value = getattr(value, "value", value)  # of an enumeration
    return "" if value is None or value is False or value in ("", (), []) else f"`{value}`"


def _sentences(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
