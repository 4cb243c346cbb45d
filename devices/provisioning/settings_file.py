"""The TOML files that devices.provision and devices.install write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Item

from fedfmsl.common.settings import PEM
from fedfmsl.errors import ConfigError, one_line

Value = str | int | float | Sequence[str]


def settings_text(*parts: tuple[str, Mapping[str, Value]]) -> str:
    """Each part is a comment and the settings that it describes."""
    document = tomlkit.document()
    for number, (comment, settings) in enumerate(parts):
        if number:
            document.add(tomlkit.nl())
        for line in comment.splitlines():
            document.add(tomlkit.comment(line))
        for key, value in settings.items():
            document.add(key, item(value))
    return tomlkit.dumps(document)


def read_table(path: Path) -> dict[str, Any]:
    """Raises ConfigError if the file is not TOML."""
    return read_document(path).unwrap()


def read_document(path: Path) -> tomlkit.TOMLDocument:
    """With its comments, for changes. Raises ConfigError if the file is not TOML."""
    try:
        return tomlkit.parse(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}; pass a file from devices.provision") from None


def dumps(document: tomlkit.TOMLDocument) -> str:
    return tomlkit.dumps(document)


def item(value: Value) -> Item:
    if isinstance(value, str) and value.startswith(PEM):
        return tomlkit.value(f'"""\n{value}"""')  # OpenSSL reads the file, and expects BEGIN at the start of a line
    return tomlkit.item(value)
