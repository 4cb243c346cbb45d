"""A device's settings as the text of a TOML file: devices.provision hands it over, devices.install puts it up."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedfmsl.errors import ConfigError, one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Value = str | int | float | Sequence[str]


def settings_text(*parts: tuple[str, Mapping[str, Value]]) -> str:
    """Each part is a comment, and the settings that it speaks of."""
    return "\n".join(
        "".join(f"# {line}\n" for line in comment.splitlines())
        + "".join(f"{key} = {_literal(value)}\n" for key, value in settings.items())
        for comment, settings in parts
    )


def read_table(path: Path) -> dict[str, Any]:
    """Raises ConfigError if there is no TOML in it."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # not UTF-8 and not TOML are ValueErrors both
        raise ConfigError(f"{path} cannot be read: {one_line(error)}; give a file of devices.provision") from None


def value_of(text: str) -> Any:
    """What a setting given on the command line means: a value as in TOML, or else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _literal(value: Value) -> str:
    """In ASCII, which no editor and no locale gets wrong."""
    if isinstance(value, str):
        if value.startswith("-----BEGIN"):
            return f'"""\n{value}"""'  # PEM: base64, so nothing in it needs escaping
        return f'"{"".join(map(_escaped, value))}"'
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value)


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if " " <= character <= "~" else f"\\U{ord(character):08x}"
