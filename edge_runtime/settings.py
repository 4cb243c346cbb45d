"""The settings of a device: out of one TOML file, the environment and flags, checked together.

Each key of the file is also a variable FEDFMSL_KEY and a flag --key. A flag goes before the environment, and that
before the file. All that is wrong is said at once, each with the place it stands at.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from edge_runtime.resources.governor import Hours, Limits
from fedfmsl.common.log import LogForm
from fedfmsl.errors import ConfigError, one_line
from fedfmsl.protocol.messages import EngineChoice
from fedfmsl.protocol.topics import check_name
from fedfmsl.transport.address import listening_on, parse_address, without_password

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PREFIX = "FEDFMSL_"
PEM = "-----BEGIN"


def _listed(value: Any) -> Any:
    """A flag or a variable holds a list with commas in between."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _checked(check: Callable[[str], object]) -> AfterValidator:
    """By a function that raises ConfigError, which pydantic does not collect."""

    def validate(text: str) -> str:
        try:
            check(text)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return text

    return AfterValidator(validate)


Listed = BeforeValidator(_listed)
File = Annotated[Path, AfterValidator(Path.expanduser)]
Fraction = Annotated[float, Field(gt=0, le=1)]
RunName = Annotated[str, _checked(partial(check_name, "run"))]
DeviceName = Annotated[str, _checked(partial(check_name, "device"))]
Broker = Annotated[str, _checked(parse_address)]


class StateSettings(BaseModel):
    """What is needed to find a device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: File = Field(Path("device"), description="Folder for what this device must not lose.")


class BrokerSettings(StateSettings):
    """Where something is said of it, and as whom."""

    broker: Broker = Field(
        "mqtt://localhost:1883",
        description="mqtt, mqtts, ws or wss://HOST, or HOST:PORT; user and password as USER:PASSWORD@HOST, or by "
        "FEDFMSL_USER and FEDFMSL_PASSWORD.",
    )
    identity: File | None = Field(
        None, description="File of devices.provision: who we are, and whom to trust, over TLS. In a file also its text."
    )
    insecure: bool = Field(False, description="Let traffic leave this machine unencrypted.")
    home_assistant: str = Field(
        "homeassistant",
        pattern=r"^[A-Za-z0-9_-]*$",
        description="Discovery prefix of Home Assistant, to which predictions are introduced. Empty: they are not.",
    )


class PredictSettings(BrokerSettings):
    """What is needed to use its model."""

    run: RunName | None = Field(None, description="The run to publish in.")
    bundle: File | None = Field(None, description="A bundle's folder. Default: the model's, in the state folder.")


class LinkSettings(BrokerSettings):
    """What is needed to speak for it."""

    run: RunName = Field(description="The run's name.")
    device: DeviceName | None = Field(
        None, description="This device's name, at its first start. Default: the identity's, or from the host's."
    )
    log: LogForm = Field("text", description="text, or json: one object per line.")
    log_file: File | None = Field(None, description="Also log to this file; a few megabytes of it are kept.")


class Settings(LinkSettings):
    """All that the daemon needs."""

    images: File = Field(
        description="Folder of images, or of texts: DIR/<class>/… or DIR/{train,test}/<class>/…; see also labels."
    )
    labels: File | None = Field(
        None, description="CSV of `file,class`, the files relative to the folder. Default: subfolders are classes."
    )
    bundle: File | None = Field(None, description="A bundle's folder. Default: fetched from the run's server.")
    engine: EngineChoice = Field(
        "auto", description="What trains. auto: onnxruntime-training where it is installed and the bundle built for it."
    )
    threads: int = Field(0, ge=0, description="Threads to compute with. 0: one per core.")
    memory: ByteSize | None = Field(None, description="Memory it may take, like 512MB. Default: half of what there is.")
    cache: ByteSize | None = Field(
        None,
        description="Disk that features may take, like 2GB; others are computed each time. Default: half of the free.",
    )
    keep_free: ByteSize = Field(
        ByteSize(500_000_000), description="Disk that is left free: features give way before it is touched."
    )
    step_seconds: float = Field(60.0, ge=0.001, description="Longest time a training step may take.")
    hours: Annotated[tuple[Hours, ...], Listed] = Field(
        (),
        description="When it may train, local time: 22:00-06:00 or Sat-Sun 08:00-20:00, several with commas. "
        "Default: always.",
    )
    max_temperature: float | None = Field(
        None, ge=0, le=120, description="°C above which it does not train. Default: no limit."
    )
    thermal_zones: Annotated[tuple[str, ...], Listed] = Field(
        (), description="The thermal zones that count, by type. Default: all that make sense."
    )
    mains_only: bool = Field(False, description="Train on mains power only, not on a battery.")
    max_load: Fraction | None = Field(
        None, description="Share of the processors that others may use while it trains, up to 1. Default: no limit."
    )
    on_metered: bool = Field(True, description="Train, and so send updates, on a metered network as well.")
    watch: File | None = Field(
        None, description="Folder whose files are classified as they come, with this device's newest model."
    )
    stay: bool = Field(
        False, description="Wait for the next run of the name once one has finished; with --watch it always does."
    )
    metrics: str | None = Field(None, description="HOST:PORT to tell Prometheus on. Default: none.")

    @field_validator("metrics")
    @classmethod
    def _may_listen(cls, address: str | None, info: ValidationInfo) -> str | None:
        if address is not None:
            try:
                listening_on(address, "what it tells", bool(info.data.get("insecure")))
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return address

    @property
    def limits(self) -> Limits:
        return Limits(self.hours, self.max_temperature, self.mains_only, self.max_load, self.on_metered)


M = TypeVar("M", bound=StateSettings)


@dataclass(frozen=True)
class Given:
    """A value, and how the place it stands at is called."""

    value: Any
    place: str


class SettingsError(ConfigError):
    """Several settings may be wrong: each has a line of its own."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self._problems = tuple(problems)

    @property
    def lines(self) -> tuple[str, ...]:
        return self._problems


def read_settings(model: type[M], config: Path | None, given: Mapping[str, Given]) -> M:
    """The settings of `model` out of the file and what was given otherwise. Raises SettingsError."""
    problems: list[str] = []
    values = {**(_read_file(config, problems) if config else {}), **given}
    known = {key: each for key, each in values.items() if key in model.model_fields}
    try:
        settings = model.model_validate({key: each.value for key, each in known.items()})
    except ValidationError as error:
        problems += [_explain(details, known, config) for details in error.errors()]
    if problems:
        raise SettingsError(problems)
    return settings


CONFIG = typer.Option(
    None, "--config", envvar=f"{PREFIX}CONFIG", help="TOML file of all the settings below; flags go before it."
)


def with_settings(
    model: type[M],
    file: Any = CONFIG,
    read: Callable[[type[M], Path | None, Mapping[str, Given]], Any] = read_settings,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command `command(settings, …)` take the file, by a parameter of typer's, and an option for every key of
    `model`, beside its own. `read` makes the command's first argument of them."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()

        def wrapped(context: typer.Context, config: Path | None = None, **options: Any) -> None:
            mine = {parameter.name: options.pop(parameter.name) for parameter in own}
            given = {}
            for key, value in options.items():
                if value is not None:
                    source = context.get_parameter_source(key)  # an enumeration of click's, or of typer's own click
                    from_environment = source is not None and source.name == "ENVIRONMENT"
                    name = f"{PREFIX}{key.upper()}" if from_environment else flag_of(key)
                    given[key] = Given(value, f"{name} {_shown(str(value))}")
            command(read(model, config, given), **mine)

        parameters = [_parameter("context", typer.Context), _parameter("config", Path | None, file)]
        parameters += [_parameter(key, _typed(key), _option(model, key)) for key in model.model_fields]
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        signature = inspect.Signature(parameters)
        wrapped.__name__, wrapped.__doc__ = (
            command.__name__,
            command.__doc__,
        )  # what the command is called, and its help
        wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
        vars(wrapped)["__signature__"] = signature
        return wrapped

    return decorate


def flag_of(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _read_file(path: Path, problems: list[str]) -> dict[str, Given]:
    """Its keys and values, paths in it made relative to its folder. What no setting is called goes into `problems`."""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read ({error}); give a file that this user may read") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f'{path} is not TOML: {one_line(error)}; strings need quotes, as in run = "orchard"'
        ) from None
    values = {}
    for key, value in table.items():
        place = f"{path}{_line_of(text, key)}"
        if key not in Settings.model_fields:
            near = difflib.get_close_matches(key, Settings.model_fields, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(Settings.model_fields)}"
            problems.append(f"{place}: {key!r} is not a setting; {meant}")
            continue
        values[key] = Given(_in_place(key, value, path), f"{place}: {key} = {_shown(value)}")
    return values


def _shown(value: Any) -> str:
    """In one line, and without what is secret."""
    text = value if isinstance(value, str) else ""
    return one_line(repr("…" if PEM in text else without_password(text) if "@" in text else value))


def _in_place(key: str, value: Any, file: Path) -> Any:
    """A path as it is meant in `file`; an identity that stands in it is the file itself."""
    if key == "identity" and isinstance(value, str) and PEM in value:
        return file
    if key in _PATHS and isinstance(value, str) and value:
        return file.parent / Path(value).expanduser()
    return value


def _line_of(text: str, key: str) -> str:
    found = re.search(rf"^[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*=", text, re.MULTILINE)
    return f":{text.count(chr(10), 0, found.start()) + 1}" if found else ""


def _explain(details: ErrorDetails, values: Mapping[str, Given], config: Path | None) -> str:
    key = str(details["loc"][0])
    if details["type"] == "missing":
        where = f"in {config}" if config else "in the file of --config"
        return f"{flag_of(key)} is missing; give it, or {PREFIX}{key.upper()}, or {key} {where}"
    if details["type"].startswith("byte_size"):
        return f"{values[key].place} is not a size; write it like 512MB or 2GB"
    return f"{values[key].place}: {one_line(details['msg'].removeprefix('Value error, '))}"


_PATHS = frozenset(key for key, field in Settings.model_fields.items() if "Path" in str(field.annotation))


def _option(model: type[StateSettings], key: str) -> Any:
    field = model.model_fields[key]
    names = (flag_of(key),) if _typed(key) != bool | None else (f"{flag_of(key)}/--no-{flag_of(key)[2:]}",)
    help_text = f"{field.description}"
    if not field.is_required() and field.default not in (None, (), "", False):
        help_text += f" Default: {_default(field.default)}."
    return typer.Option(None, *names, envvar=f"{PREFIX}{key.upper()}", help=help_text, show_default=False)


def _default(default: Any) -> str:
    return default.human_readable(decimal=True) if isinstance(default, ByteSize) else str(default)


def _typed(key: str) -> Any:
    """Flags reach pydantic as texts, which it checks together with all others; a switch has no text."""
    return bool | None if Settings.model_fields[key].annotation is bool else str | None


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
