"""The base of every settings model: one declaration gives flags, environment variables, TOML keys and a reference page.

A key KEY is the flag --KEY (with dashes), the variable FEDFMSL_KEY and the key KEY of a TOML file. A flag has priority
over a variable, a variable over the file. All errors are reported together, each with the place of its value.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, SettingsConfigDict

from fedfmsl.errors import ConfigError, one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "FEDFMSL_"
PEM = "-----BEGIN"
LARGEST = 2**53  # of a number; integers up to this are exact as a float
MAX_THREADS = 1024
NOT_A_SIZE = "is not a size; write it like 512MB or 2GB"
NOT_AN_INTEGER, NOT_A_NUMBER = "is not an integer; write it like 2", "is not a number; write it like 0.5"
NOT_A_SWITCH = "is neither true nor false; write one of them"
_TEXTS = {  # of pydantic's error types; the fields are those of the error's context
    "bool_parsing": NOT_A_SWITCH,
    "bool_type": NOT_A_SWITCH,
    "byte_size": NOT_A_SIZE,
    "byte_size_unit": NOT_A_SIZE,
    "enum": "is unknown; choose {expected}",
    "finite_number": "is not finite; write it like 0.5",
    "float_parsing": NOT_A_NUMBER,
    "float_type": NOT_A_NUMBER,
    "greater_than": "is too small; it must be more than {gt:g}",
    "greater_than_equal": "is too small; it must be at least {ge:g}",
    "int_from_float": NOT_AN_INTEGER,
    "int_parsing": NOT_AN_INTEGER,
    "int_type": NOT_AN_INTEGER,
    "less_than": "is too large; it must be less than {lt:g}",
    "less_than_equal": "is too large; it must be at most {le:g}",
    "literal_error": "is unknown; choose {expected}",
    "path_type": "is not a path; write it as a text in quotes",
    "string_type": "is not a text; put it in quotes",
    "tuple_type": "is not a list; write [{value}]",
}
_FILE_TYPES: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float)}  # of values in a file
_WRONG_TYPE = object()  # pydantic rejects it; it would convert some values of a wrong type
THE_SETTINGS = "the settings are"
EXAMPLE = 'pass a text file with lines like run = "orchard"'
_LOGIN = re.compile(r"(\w+://)?.*@", re.DOTALL)  # USER:PASSWORD@ of an address
_NO_PORT = re.compile(r"(://[^/:@\[\]]*:)(?!\d{1,5}(?:/|$)).*", re.DOTALL)  # USER:PASSWORD without its @


class SettingsModel(BaseSettings):
    """Base of a settings model. `Field(json_schema_extra=panel("…"))` puts a setting into a group of the help."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        env_prefix=PREFIX,
        env_ignore_empty=True,
        enable_decoding=False,
    )

    @field_validator("*")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        """A larger number fails in messages, in databases, or as a time."""
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int | float) and abs(each) > LARGEST:
                raise PydanticCustomError("less_than_equal", "too large", {"le": LARGEST})
        return value


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
    if not isinstance(value, str):
        return value
    return [part.strip() for part in not_empty(value).split(",") if part.strip()]


def not_empty(value: Any) -> Any:
    """The value as it is. Raises ValueError if it is an empty text, as of an environment variable that is not set: it
    would mean the present folder, or no limit."""
    if isinstance(value, str) and not value.strip(" ,"):
        raise ValueError("is empty; give a value, or leave it out")
    return value


def panel(name: str) -> dict[str, Any]:
    """The group of the help that a setting belongs to."""
    return {"panel": name}


CommaSeparated = BeforeValidator(_split_list)  # a list in a file, a text with commas in a flag or variable
File = Annotated[Path, BeforeValidator(not_empty), AfterValidator(Path.expanduser)]
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
    problems = list(file.problems)  # pairs of a line of the file and a text
    sources: dict[str, Any] = {"_build_sources": ((flag, env, file), {})}
    try:
        settings = model(**sources)
    except ValidationError as error:
        places = {
            **file.places,
            **{key: Place(f"{variable_of(key)} ", _redacted(value)) for key, value in env().items()},
            **{key: Place(f"{flag_of(key)} ", _redacted(str(value))) for key, value in (flags or {}).items()},
        }
        problems += [_explain(details, places, config) for details in error.errors()]
    if problems:
        raise SettingsError([text for _, text in sorted(problems, key=lambda problem: problem[0])])
    return settings


class Place(NamedTuple):
    """Where a value is, the value for messages, and its line of the file. Other values follow those of the file."""

    name: str
    value: str
    line: float = math.inf


class TomlSource(InitSettingsSource):
    """The settings in a TOML file. Relative paths in it are relative to its folder."""

    def __init__(self, model: type[SettingsModel], path: Path | None, file_model: type[SettingsModel]) -> None:
        """Raises ConfigError if the file cannot be read or is not TOML."""
        self.problems: list[tuple[float, str]] = []  # unknown keys, with their lines
        self.places: dict[str, Place] = {}
        text, table = load_toml(path) if path else ("", {})
        values, listed = {}, False
        for key, value in table.items():
            line = _line_of(text, key)
            place = f"{path}:{line}" if line else f"{path}"
            if key not in file_model.model_fields:
                remedy = _suggest(key, file_model.model_fields, list_all=not listed)
                listed = listed or remedy.startswith(THE_SETTINGS)
                self.problems.append((line, f"{place}: {key!r} is not a setting; {remedy}"))
            elif key in model.model_fields and path:
                self.places[key] = Place(f"{place}: {key} = ", _redacted(value), line)
                values[key] = _file_value(value, type_of(model.model_fields[key])[0], path)
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


def load_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file, and its values. Raises ConfigError if the file cannot be read or is not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path} does not exist; check the path") from error
    except OSError as error:
        raise ConfigError(
            f"--config {path} cannot be read ({error.strerror}); give a file that this user may read"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not a TOML file; {EXAMPLE}") from error
    if "\0" in text:
        raise ConfigError(f"--config {path} is not a TOML file; {EXAMPLE}")
    return text, parse_toml(text, path)


def parse_toml(text: str, source: object) -> dict[str, Any]:
    """The values of a TOML text. `source`: where it is from, for the error. Raises ConfigError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {_explain_toml(text, one_line(error))}") from None


def _explain_toml(text: str, message: str) -> str:
    if message.startswith("Cannot overwrite a value"):
        found = re.search(r"line (\d+)", message)
        line = int(found[1]) if found else len(text.splitlines())
        key = text.splitlines()[line - 1].partition("=")[0].strip()
        return f"{key!r} is set twice, again in line {line}; remove one"
    if message.startswith("Invalid value"):
        return f'{message}; strings need quotes, as in run = "orchard"'
    return message


def _suggest(key: str, known: Iterable[str], list_all: bool) -> str:
    near = difflib.get_close_matches(key, known, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"{THE_SETTINGS} {', '.join(known)}" if list_all else "remove it"


def _file_value(value: Any, kind: Any, file: Path) -> Any:
    """A value of a file for a setting of type `kind`. Paths are relative to the folder of `file`."""
    if kind is Path:
        return _resolve(value, file)
    accepted = _FILE_TYPES.get(kind, (object,))
    matches = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    return value if matches else _WRONG_TYPE


def _resolve(value: Any, file: Path) -> Any:
    """A path relative to the folder of `file`. PEM text instead of a path means the file itself."""
    if not isinstance(value, str) or not value:
        return value
    return file if PEM in value else file.parent / Path(value).expanduser()


def _line_of(text: str, key: str) -> int:
    """The line of a key or of a table; 0 if it is not found."""
    name = rf"[\"']?{re.escape(key)}[\"']?[ \t]*"
    found = re.search(rf"^[ \t]*(?:{name}[=.]|\[+[ \t]*{name}[\].])", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 0


def _redacted(value: Any) -> str:
    """A value as one line, without private keys and passwords."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return one_line(repr(value))
    return one_line(repr("…" if PEM in value else without_secrets(value)))


def without_secrets(address: str) -> str:
    """An address without user and password, for messages. What follows a host's colon is shown only if it is a port."""
    return _NO_PORT.sub(r"\1…", _LOGIN.sub(r"\1", address))


def _explain(details: ErrorDetails, places: Mapping[str, Place], config: Path | None) -> tuple[float, str]:
    """The line of the file where an error is, and its text."""
    message = one_line(details["msg"].removeprefix("Value error, "))
    if not details["loc"]:  # several settings do not fit together
        return math.inf, message
    key = str(details["loc"][0])
    if details["type"] == "missing":
        where = f"in {config}" if config else "in the file of --config"
        return math.inf, f"{flag_of(key)} is missing; give it, or {variable_of(key)}, or {key} {where}"
    name, value, line = places[key]
    if details["type"] in _TEXTS:
        return line, f"{name}{value} {_TEXTS[details['type']].format(value=value, **details.get('ctx', {}))}"
    _, quoted, predicate = message.partition(value)
    if quoted and value[0] in "'\"":  # shows the value once
        return line, f"{name}{value}{predicate}"
    return line, f"{name}{value}{'' if message.startswith('is ') else ':'} {message}"
