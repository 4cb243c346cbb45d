"""The base of every settings model: one declaration gives flags, environment variables, TOML keys and a reference page.

A key KEY is the flag --KEY (with dashes), the variable FEDFMSL_KEY and the key KEY of a TOML file. A flag has priority
over a variable, a variable over the file. All errors are reported together, each with the place of its value.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, SettingsConfigDict

from fedfmsl.errors import ConfigError, one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "FEDFMSL_"
PEM = "-----BEGIN"
NOT_A_SIZE = "is not a size; write it like 512MB or 2GB"
_PASSWORD = re.compile(r"(\w+://)?\S*@")  # USER:PASSWORD@ of an address


class SettingsModel(BaseSettings):
    """Base of a settings model. `Field(json_schema_extra=panel("…"))` puts a setting into a group of the help."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_ignore_empty=True, enable_decoding=False
    )


M = TypeVar("M", bound=SettingsModel)


def checked(check: Callable[[str], object]) -> AfterValidator:
    """A validator from a function that raises ConfigError. pydantic collects only ValueErrors."""

    def validate(text: str) -> str:
        try:
            check(text)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return text

    return AfterValidator(validate)


def _split_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def panel(name: str) -> dict[str, Any]:
    """The group of the help that a setting belongs to."""
    return {"panel": name}


CommaSeparated = BeforeValidator(_split_list)  # a list in a file, a text with commas in a flag or variable
File = Annotated[Path, AfterValidator(Path.expanduser)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class SettingsError(ConfigError):
    """One or more settings are wrong. `lines` has one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self._problems = tuple(problems)

    @property
    def lines(self) -> tuple[str, ...]:
        return self._problems


def flag_of(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def variable_of(key: str) -> str:
    return f"{PREFIX}{key.upper()}"


def read_settings(
    model: type[M],
    config: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environment: bool = True,
    file_model: type[SettingsModel] | None = None,
) -> M:
    """Reads `model` from flags, the environment and a TOML file.

    `file_model` is the model of all keys that the file may hold; default: `model`. Raises SettingsError with every
    error found, ConfigError if the file cannot be read.
    """
    file = TomlSource(model, config, file_model or model)
    env = EnvSettingsSource(model) if environment else InitSettingsSource(model, {})
    flag = InitSettingsSource(model, dict(flags or {}))
    problems = list(file.problems)
    sources: dict[str, Any] = {"_build_sources": ((flag, env, file), {})}
    try:
        settings = model(**sources)
    except ValidationError as error:
        places = {
            **file.places,
            **{key: f"{variable_of(key)} {_redacted(value)}" for key, value in env().items()},
            **{key: f"{flag_of(key)} {_redacted(str(value))}" for key, value in (flags or {}).items()},
        }
        problems += [_explain(details, places, config) for details in error.errors()]
    if problems:
        raise SettingsError(problems)
    return settings


class TomlSource(InitSettingsSource):
    """The settings in a TOML file. Relative paths in it are relative to its folder."""

    def __init__(self, model: type[SettingsModel], path: Path | None, file_model: type[SettingsModel]) -> None:
        """Raises ConfigError if the file cannot be read or is not TOML."""
        self.problems: list[str] = []  # unknown keys
        self.places: dict[str, str] = {}  # of each key: file, line and value
        text, table = _load(path) if path else ("", {})
        values = {}
        for key, value in table.items():
            place = f"{path}{_line_of(text, key)}"
            if key not in file_model.model_fields:
                self.problems.append(f"{place}: {key!r} is not a setting; {_suggest(key, file_model.model_fields)}")
            elif key in model.model_fields and path:
                self.places[key] = f"{place}: {key} = {_redacted(value)}"
                values[key] = _resolve(value, path) if type_of(model.model_fields[key])[0] is Path else value
        super().__init__(model, values)


def type_of(field: FieldInfo) -> tuple[Any, list[Any]]:
    """The type of a setting without None and Annotated, and all its constraints."""
    annotation, constraints = field.annotation, list(field.metadata)
    if type(None) in get_args(annotation):
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        constraints += [each for one in more for each in (one.metadata if isinstance(one, FieldInfo) else [one])]
    return annotation, constraints


def _load(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read ({error}); give a file that this user may read") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f'{path} is not TOML: {one_line(error)}; strings need quotes, as in run = "orchard"'
        ) from None


def _suggest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(known)}"


def _resolve(value: Any, file: Path) -> Any:
    """A path relative to the folder of `file`. PEM text instead of a path means the file itself."""
    if not isinstance(value, str) or not value:
        return value
    return file if PEM in value else file.parent / Path(value).expanduser()


def _line_of(text: str, key: str) -> str:
    found = re.search(rf"^[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*=", text, re.MULTILINE)
    return f":{text.count(chr(10), 0, found.start()) + 1}" if found else ""


def _redacted(value: Any) -> str:
    """A value as one line, without private keys and passwords."""
    if not isinstance(value, str):
        return one_line(repr(value))
    return one_line(repr("…" if PEM in value else _PASSWORD.sub(r"\1", value)))


def _explain(details: ErrorDetails, places: Mapping[str, str], config: Path | None) -> str:
    message = one_line(details["msg"].removeprefix("Value error, "))
    if not details["loc"]:  # several settings do not fit together
        return message
    key = str(details["loc"][0])
    if details["type"] == "missing":
        where = f"in {config}" if config else "in the file of --config"
        return f"{flag_of(key)} is missing; give it, or {variable_of(key)}, or {key} {where}"
    if details["type"].startswith("byte_size"):
        return f"{places[key]} {NOT_A_SIZE}"
    return f"{places[key]}: {message}"
