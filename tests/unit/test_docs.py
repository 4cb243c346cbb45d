"""README and docs match the code: commands, options, settings, links, reference, and a site without warnings."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from edge_runtime.settings import Settings
from fedfmsl.common.lazy_group import commands_of
from fedfmsl.common.settings import SettingsModel, read_settings
from trainer_server.settings import ServerSettings

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
]
FOLDERS = {
    *("fedfmsl", "export", "trainer_server", "edge_runtime", "devices", "simulation", "benchmarks"),
    *("examples", "tests", "docs"),
}
OTHER_MODULES = {"pytest", "mkdocs", "venv", "pip"}
OTHER_OPTIONS = {
    "--full",
    "--no-deps",
    "--wheel-dir",
    "--strict",
    "--install-completion",
}  # of pytest, pip, mypy, typer

GROUP_OPTIONS = {"--help", "--version", "--install-completion"}  # devices.provision passes others to a command

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@cache
def command_of(module: str) -> Any:
    """The click command of `python -m MODULE`."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    name = f"{module}.__main__" if spec.submodule_search_locations is not None else module
    return typer.main.get_command(importlib.import_module(name).app)


def fenced_blocks(text: str, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands_in(text: str) -> Iterator[list[str]]:
    """Module (or `fedfmsl`) and arguments of every command of this project in a text's blocks and inline code."""
    lines = [line for block in fenced_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # an apostrophe in the output of a command
        names = [Path(word).name for word in words]
        for index, name in enumerate(names[:-2]):
            if name.startswith("python") and names[index + 1] == "-m" and words[index + 2] not in OTHER_MODULES:
                yield until_operator(words[index + 2 :])
        if names[:1] == ["fedfmsl"] and len(names) > 1:
            yield until_operator(words)


def until_operator(words: list[str]) -> list[str]:
    """One command of a line: words up to &&, ; or |."""
    end = next((index for index, word in enumerate(words) if word in {"&&", ";", "|"}), len(words))
    return words[:end]


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The click command that `words` name, and its arguments."""
    command, arguments = command_of(words[0]), words[1:]
    while hasattr(command, "resolve_command") and arguments and arguments[0] not in GROUP_OPTIONS:
        context = command.make_context(command.name, [], resilient_parsing=True)
        _, command, arguments = command.resolve_command(context, arguments)
    return command, arguments


def options_of(command: Any) -> set[str]:
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union({"--help"}, *map(options_of, commands_of(command).values()))


def parse(command: Any, arguments: list[str]) -> None:
    """Parses as the command line does, without running the command. Text may leave out required options."""
    try:
        command.make_context(command.name, [word for word in arguments if word != "--help"])
    except Exception as error:
        if type(error).__name__ != "MissingParameter":
            raise AssertionError(f"{command.name} {shlex.join(arguments)}: {error}") from error


@each_page
def test_commands_parse(page: Path) -> None:
    for words in commands_in(page.read_text()):
        command, arguments = resolve(words)
        if not hasattr(command, "resolve_command") or arguments not in ([], ["--help"], ["--version"]):
            parse(command, arguments)


@each_page
def test_options_that_text_names_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # it names options that are gone
    modules = ("edge_runtime", "trainer_server", "export.build", "export.hub", "devices.provision", "devices.install")
    known = OTHER_OPTIONS.union(*map(options_of, map(command_of, (*modules, "devices.boards", "devices.trial"))))
    known |= options_of(command_of("devices.trial.assets"))
    known = known.union(*(options_of(resolve(words)[0]) for words in commands_in(page.read_text())))
    named = {
        option
        for code in re.findall(r"`([^`\n]+)`", page.read_text())
        for option in re.findall(r"--[a-z][\w-]*\w", code)
    }
    assert named <= known


def anchors_of(page: Path) -> set[str]:
    """As GitHub and mkdocs name headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@each_page
def test_internal_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in anchors_of(file), f"{page.name}: {target} has no such heading"


@each_page
def test_files_that_text_names_exist(page: Path) -> None:
    """Paths in inline code that begin with a folder of the repository."""
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*)`", page.read_text())
    ours = [path for path in named if path.split("/")[0] in FOLDERS and not re.search("[A-Z]{3}", path)]
    assert not [path for path in ours if not (REPOSITORY / path).exists()]


@each_page
def test_settings_files_in_the_docs_are_valid(page: Path, tmp_path: Path) -> None:
    for block in fenced_blocks(page.read_text(), "toml"):
        file = tmp_path / "settings.toml"
        file.write_text(block)
        model: type[SettingsModel] = ServerSettings if "devices = " in block else Settings
        read_settings(model, file, environment=False)


def test_the_readme_has_at_most_150_lines() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


def test_the_glossary_defines_each_term_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    terms = [term for row in rows if row != "term" for term in row.split(", ")]
    assert len(terms) == len(set(terms))


def test_the_reference_is_generated_from_the_code() -> None:
    page = runpy.run_path(str(DOCS / "generate_reference.py"))["page"]
    assert (DOCS / "reference.md").read_text() == page(), "run python docs/generate_reference.py"


def test_every_command_in_the_reference_has_a_description() -> None:
    commands = re.findall(r"^#+ (python -m .+)\n\n(.*)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert commands
    assert not [command for command, description in commands if not description or description.startswith("|")]


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "reference" / "index.html").is_file()
