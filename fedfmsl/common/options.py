"""A settings model as options of a typer command, and as a reference page."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo

from fedfmsl.common.settings import PREFIX, SettingsModel, flag_of, read_settings, type_of, variable_of

CONFIG = typer.Option(
    None,
    "--config",
    envvar=f"{PREFIX}CONFIG",
    help="TOML file with any of the settings below. Flags and variables have priority over it.",
)
_TYPES = {bool: "", int: "int", float: "float", Path: "path", ByteSize: "size", tuple: "list", str: "text"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclass(frozen=True)
class Setting:
    """A setting as the help and the reference page show it."""

    key: str
    help: str
    panel: str
    type: str  # "" for a switch
    choices: tuple[str, ...]
    bounds: str
    default: str  # "" if there is none, or the help describes it
    required: bool

    @property
    def flags(self) -> str:
        flag = flag_of(self.key)
        return flag if self.type else f"{flag}/--no-{flag[2:]}"


def settings_of(model: type[SettingsModel]) -> list[Setting]:
    """The settings of a model: those that are required first, then in the order of the model."""
    found = [_setting(key, field) for key, field in model.model_fields.items()]
    return sorted(found, key=lambda setting: not setting.required)


def with_settings(
    model: type[SettingsModel],
    file_model: type[SettingsModel] | None = None,
    file: Any = CONFIG,
    read: Callable[[Path | None, Mapping[str, Any]], Any] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command `command(settings, …)` an option for every setting of `model`, beside its own options.

    `file_model` is the model of all keys that the TOML file may hold. `file` is the typer parameter that names the
    file. `read` makes the first argument of the command from the file and the flags; default: `read_settings`.
    """

    def read_model(config: Path | None, flags: Mapping[str, Any]) -> Any:
        return read_settings(model, config, flags, file_model=file_model)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()

        def wrapped(config: Path | None = None, **options: Any) -> None:
            others = {parameter.name: options.pop(parameter.name) for parameter in own}
            flags = {key: value for key, value in options.items() if value is not None}
            command((read or read_model)(config, flags), **others)

        parameters = [_parameter("config", Path | None, file)]
        parameters += [
            _parameter(setting.key, str | None if setting.type else bool | None, _option(setting))
            for setting in settings_of(model)
        ]
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__annotations__ = {each.name: each.annotation for each in parameters}
        vars(wrapped)["__signature__"] = inspect.Signature(parameters)
        return wrapped

    return decorate


def reference(model: type[SettingsModel], level: int = 3) -> str:
    """A Markdown table of settings for each panel of the help, under headings of this level."""
    panels: dict[str, list[str]] = {}
    for setting in settings_of(model):
        default = "required" if setting.required else f"`{setting.default}`" if setting.default else ""
        kind = " or ".join(f"`{choice}`" for choice in setting.choices) or setting.type or "true or false"
        text = setting.help.replace("|", "\\|").replace("<", "&lt;")
        cells = [f"`{setting.key}`", f"{kind} {setting.bounds}".strip(), default, text]
        panels.setdefault(setting.panel, []).append(f"| {' | '.join(cells)} |")
    head = "| setting | type | default | meaning |\n|---|---|---|---|"
    return "\n\n".join(f"{'#' * level} {name}\n\n{head}\n" + "\n".join(rows) for name, rows in panels.items())


def _setting(key: str, field: FieldInfo) -> Setting:
    annotation, constraints = type_of(field)
    origin = get_origin(annotation)
    choices: tuple[str, ...] = ()
    if origin is Literal:
        choices = get_args(annotation)
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        choices = tuple(each.value for each in annotation)
    kind = "|".join(choices) or _TYPES[origin or annotation]
    bounds = [
        f"{sign} {getattr(each, name):g}"
        for each in constraints
        for name, sign in _BOUNDS.items()
        if hasattr(each, name)
    ]
    extra = field.json_schema_extra
    return Setting(
        key=key,
        help=field.description or "",
        panel=str(extra.get("panel", "Options")) if isinstance(extra, dict) else "Options",
        type=kind,
        choices=choices,
        bounds=", ".join(bounds),
        default="" if field.is_required() else _default(field.default),
        required=field.is_required(),
    )


def _default(value: Any) -> str:
    if value in (None, (), "") or value is False:
        return ""
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, ByteSize):
        return value.human_readable(decimal=True)
    return str(value.value if isinstance(value, Enum) else value)


def _option(setting: Setting) -> Any:
    """An option of type text, or a switch. pydantic checks the text later, together with all other settings."""
    notes = [f"default: {setting.default}"] if setting.default else []
    notes += [setting.bounds] if setting.bounds else []
    notes += [f"env var: {variable_of(setting.key)}"]
    notes += ["required"] if setting.required else []
    return typer.Option(
        None,
        *setting.flags.split(" "),
        help=" ".join([setting.help, *(f"\\[{note}]" for note in notes)]),
        metavar=f"<{setting.type}>" if setting.type else None,
        show_default=False,
        rich_help_panel=setting.panel,
        autocompletion=(lambda: list(setting.choices)) if setting.choices else None,
    )


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
