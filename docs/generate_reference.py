"""Writes docs/reference.md from the code: settings, commands and exit codes.

python docs/generate_reference.py

A test compares the page with `page()`.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import typer
from prometheus_client.core import Metric

from devices.trial.settings import TrialSettings
from edge_runtime.daemon import metrics as device_metrics
from edge_runtime.settings import Settings
from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.common.exit_codes import EXIT_CODES
from fedfmsl.common.lazy_group import commands_of
from fedfmsl.common.options import reference
from fedfmsl.common.settings import SettingsModel
from fedfmsl.protocol.messages import Activity, Health, Stage
from simulation.settings import SimulationSettings
from trainer_server.service import metrics as server_metrics
from trainer_server.service.figures import Figures, Snapshot
from trainer_server.settings import ServerSettings

PAGE = Path(__file__).with_name("reference.md")
# Module of each command's typer application, in the order of the page.
MODULES = (
    "edge_runtime.__main__",
    "trainer_server.__main__",
    "export.build",
    "export.task",
    "export.hub",
    "devices.provision",
    "devices.install",
    "devices.boards",
    "devices.trial.__main__",
    "devices.trial.assets",
    "simulation.__main__",
)
MODELS: dict[str, type[SettingsModel]] = {
    "device": Settings,
    "server": ServerSettings,
    "trial": TrialSettings,
    "simulation": SimulationSettings,
}
INTRODUCTION = """\
# Settings, commands and exit codes

This page is generated from the code: `python docs/generate_reference.py`.

A setting has three forms: a key of a TOML file (`max_temperature`), an environment variable
(`FEDFMSL_MAX_TEMPERATURE`) and an option (`--max-temperature`). A switch also has a negative option (`--no-stay`). An
option overrides the environment; the environment overrides the file. The option `--config` (`FEDFMSL_CONFIG`) names
the file; relative paths in the file start at its folder. Sizes are written like `512MB` or `2GB`. A list is a TOML
list, or a text with commas. All errors are reported together.

User and password for the broker are in the address or in `FEDFMSL_USER` and `FEDFMSL_PASSWORD`.

## Exit codes

A command that fails prints one line per error to stderr: value, place and remedy.

| code | cause |
|---|---|
"""


def page() -> str:
    codes = [f"| {code} | {cause} |" for code, cause in EXIT_CODES.items()]
    settings = [f"\n## Settings of the {name}\n\n{reference(model)}" for name, model in MODELS.items()]
    return INTRODUCTION + "\n".join([*codes, *settings, *metrics(), *commands()]) + "\n"


def metrics() -> Iterator[str]:
    """Markdown tables of the Prometheus metrics of a device and of the server."""
    known = dict.fromkeys(Health.model_fields, 1)
    health = Health.model_construct(None, **{**known, "activity": next(iter(Activity))})
    yield from _metrics_of("a device", device_metrics.families(health))
    yield from _metrics_of("the server", server_metrics.families(_snapshot()))


def _snapshot() -> Snapshot:
    """Of a server of which everything is known. No value of it is shown."""
    privacy = Privacy(clip=1, noise_multiplier=1, shares=1)
    plan = Mock(config=Mock(run="", privacy=privacy, delta=0.5, secure=False), session="", bundle=Mock())
    plan.bundle.manifest.model = ""
    state = Mock(announced=Mock(stage=Stage.GLOBAL, level=1), round=1)
    for name in ("devices", "online", "ready", "expected", "answered", "awaited", "updates", "excluded"):
        setattr(state, name, frozenset())
    figures = Figures(refused=Counter({"": 1}), held_out={"mofm": 1})
    return Snapshot(plan, state, figures, PAGE.parent, certificate_until=1, broker_certificate_until=1)


def _metrics_of(who: str, families: Iterable[Metric]) -> Iterator[str]:
    yield from ("", f"## Metrics of {who}", "", "| metric | type | labels | meaning |", "|---|---|---|---|")
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in family.samples[0].labels)
        yield f"| `{name}` | {family.type} | {labels} | {_sentences(family.documentation)} |"


def commands() -> Iterator[str]:
    for module in MODULES:
        name = f"python -m {module.removesuffix('.__main__')}"
        command = typer.main.get_command(importlib.import_module(module).app)
        yield from ("", f"## {name}", "", _sentences(command.help))
        subcommands = commands_of(command)
        for title, subcommand in subcommands.items():
            if not subcommand.hidden:
                yield from ("", f"### {name} {title}", "", _sentences(subcommand.help), *_options(subcommand))
        if not subcommands:
            yield from _options(command)


def _options(command: Any) -> Iterator[str]:
    """The settings that a command takes, and a Markdown table of its other parameters."""
    parameters = [
        one for one in command.params if one.name not in ("help", "config") or one.param_type_name != "option"
    ]
    settings = [one.name for one in parameters if "\\[env var: FEDFMSL_" in (one.help or "")]
    if settings:
        whole = [name for name, model in MODELS.items() if set(settings) == set(model.model_fields)]
        all_of = [f"[all settings of the {name}](#settings-of-the-{name})" for name in whole]
        yield from ("", f"Settings: {(all_of or [', '.join(f'`{name}`' for name in settings)])[0]}.")
    rows = [_row(one) for one in parameters if one.name not in settings]
    if rows:
        yield from ("", "| option | default | meaning |", "|---|---|---|", *rows)


def _row(parameter: Any) -> str:
    argument = parameter.param_type_name == "argument"
    names = (
        [parameter.metavar or (parameter.name or "").upper()]
        if argument
        else [*parameter.opts, *parameter.secondary_opts]
    )
    default = "required" if parameter.required else _default(parameter.default)
    cells = (", ".join(f"`{name}`" for name in names), default, _sentences(parameter.help))
    return f"| {' | '.join(cells)} |"


def _default(value: Any) -> str:
    value = getattr(value, "value", value)  # of an enumeration
    return "" if value is None or value is False or value in ("", (), []) else f"`{value}`"


def _sentences(text: str | None) -> str:
    """One line, as a cell of a Markdown table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
