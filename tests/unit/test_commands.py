"""The command `fedfmsl`: its subcommands are those of the parts, and a part is imported only when it is used."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import fedfmsl
from fedfmsl import errors
from fedfmsl.__main__ import PARTS, app
from fedfmsl.common.exit_codes import EXIT_CODES

HEAVY = ("torch", "onnxruntime", "paho", "pydantic", "edge_runtime", "trainer_server", "export", "devices")


def options_of(command: Any) -> dict[str, Any]:
    """The parameters of a command and of its subcommands."""
    mine = {name: (parameter.help, parameter.required) for parameter in command.params for name in parameter.opts}
    return {"": mine, **{name: options_of(one) for name, one in getattr(command, "commands", {}).items()}}


@pytest.mark.parametrize("name", PARTS)
def test_a_subcommand_has_the_options_of_its_module(name: str) -> None:
    part = PARTS[name]
    group: Any = typer.main.get_command(app)
    _, command, _ = group.resolve_command(group.make_context("fedfmsl", [name, "--help"]), [name])
    module: Any = typer.main.get_command(import_module(part.module).app)
    expected = module.commands[part.command] if part.command else module
    assert options_of(command) == options_of(expected)
    shown = " ".join(CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output.split())
    assert shown.startswith(f"Usage: root {name}")
    for option in options_of(expected)[""]:
        assert option in shown or not option.startswith("-")


def test_help_imports_no_part() -> None:
    program = (
        "import sys; from fedfmsl.__main__ import app\n"
        "try: app(['--help'])\n"
        f"except SystemExit: print('imported', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for name, part in PARTS.items():
        assert name in done.stdout and part.help in " ".join(done.stdout.split())
    assert done.stdout.splitlines()[-1] == "imported []"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert fedfmsl.__version__ == version("fedfmsl-edge")
    assert CliRunner().invoke(app, ["--version"]).output.strip() == fedfmsl.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to classify; give files or folders, or --watch FOLDER"),
        (["--new"], "--new needs --watch"),
        (["photo.jpg", "--watch", "photos"], "exclude each other"),
    ],
)
def test_predict_names_the_arguments_that_do_not_fit_together(arguments: list[str], message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        CliRunner().invoke(app, ["predict", *arguments], catch_exceptions=False)


def test_shell_completion_of_subcommands_options_and_choices() -> None:
    def completions(words: str) -> list[str]:
        environment = {"_ROOT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner().invoke(app, [], prog_name="root", env=environment).output.split()

    assert completions("root ser") == ["server"]
    assert completions("root server sta") == ["start", "status"]
    assert completions("root server start --sal-m") == ["--sal-min-gain"]
    assert completions("root server start --select r") == ["random"]


def test_a_missing_dependency_is_named_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "export.__main__", None)
    with pytest.raises(errors.ConfigError, match=r"fedfmsl export needs .* pip install 'fedfmsl-edge\[export\]'"):
        CliRunner().invoke(app, ["export", "--help"], catch_exceptions=False)


def test_every_error_has_its_exit_code_in_the_table() -> None:
    def tree(error: type[errors.FedFMSLError]) -> list[type[errors.FedFMSLError]]:
        return [error, *(one for child in error.__subclasses__() for one in tree(child))]

    assert {error.exit_code for error in tree(errors.FedFMSLError)} <= set(EXIT_CODES)
