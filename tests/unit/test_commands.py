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
from fedfmsl.common.lazy_group import LazyGroup, commands_of

HEAVY = {"torch", "onnx", "onnxruntime", "numpy", "paho", "ssl", "sqlite3", "cryptography", "matplotlib", "pyarrow"}
GROUPS = ("fedfmsl.__main__", "edge_runtime.__main__", "trainer_server.__main__", "export.__main__")


def command_in(module: str) -> Any:
    return typer.main.get_command(import_module(module).app)


def options_of(command: Any) -> dict[str, Any]:
    """The parameters of a command and of its subcommands."""
    mine = {name: (parameter.help, parameter.required) for parameter in command.params for name in parameter.opts}
    return {"": mine, **{name: options_of(one) for name, one in commands_of(command).items()}}


@pytest.mark.parametrize("name", PARTS)
def test_a_subcommand_has_the_options_of_its_module(name: str) -> None:
    part = PARTS[name]
    group: Any = typer.main.get_command(app)
    _, command, _ = group.resolve_command(group.make_context("fedfmsl", [name, "--help"]), [name])
    module = command_in(part.module)
    expected = commands_of(module)[part.command] if part.command else module
    assert options_of(command) == options_of(expected)
    shown = " ".join(CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output.split())
    assert shown.startswith(f"Usage: root {name}")
    for option in options_of(expected)[""]:
        assert option in shown or not option.startswith("-")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        *((module, HEAVY | {"pydantic"}) for module in GROUPS),
        ("export.build", HEAVY),
        ("devices.trial.__main__", HEAVY - {"ssl"}),  # asyncio needs ssl, pydantic-settings needs asyncio
    ],
)
def test_help_imports_nothing_that_takes_long(module: str, heavy: set[str]) -> None:
    program = (
        f"import sys; from {module} import app\n"
        "try: app(['--help'])\n"
        f"except SystemExit: print('imported', sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported []"
    for name, command in getattr(command_in(module), "lazy", {}).items():
        assert command.hidden or name in done.stdout


@pytest.mark.parametrize("module", GROUPS)
def test_a_group_lists_the_commands_of_its_modules_with_their_help(module: str) -> None:
    group = command_in(module)
    assert isinstance(group, LazyGroup)
    for name, command in commands_of(group).items():
        listed = group.lazy[name]
        assert " ".join(command.help.split("\n\n")[0].split()) == listed.help
        assert command.hidden == listed.hidden
    for source in {listed.module for listed in group.lazy.values() if listed.command}:
        taken = {listed.command for listed in group.lazy.values() if listed.module == source}
        assert module == "fedfmsl.__main__" or commands_of(command_in(source)).keys() == taken  # none is left out


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
        CliRunner().invoke(app, ["export", "--help"], catch_exceptions=False, prog_name="fedfmsl")


def test_every_error_has_its_exit_code_in_the_table() -> None:
    def tree(error: type[errors.FedFMSLError]) -> list[type[errors.FedFMSLError]]:
        return [error, *(one for child in error.__subclasses__() for one in tree(child))]

    assert {error.exit_code for error in tree(errors.FedFMSLError)} <= set(EXIT_CODES)
