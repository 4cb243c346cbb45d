"""An emulated board with this project installed on it. Where there cannot be one, every test here is skipped with the
reason, and fails with CI=true."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import support.arm64.board as board_module
from support.arm64.board import HERE, PROGRAMS, PYTHON, Board, NoBoardError, build, require_emulation
from support.arm64.wheels import LOCK, build_wheel, download, install
from support.processes import Processes
from support.shared_folders import fingerprint, locked, made_once
from support.tools import not_tested, require_tool


def kept(kind: str, made_of: Path, make: Callable[[Path], object]) -> Path:
    """A folder that stays from one run to the next, until the file `made_of` changes."""
    folder = HERE / f"{kind}-{fingerprint([made_of])}"
    for old in HERE.glob(f"{kind}-*"):
        if old.is_dir() and old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return made_once(folder, make)


@pytest.fixture(scope="session")
def base() -> Board:
    """The system without this project. Read only: copy it to change it."""
    for program in ("mosquitto", *PROGRAMS):
        require_tool(program)
    try:
        with locked(HERE / "emulation.lock"):
            require_emulation()
        return Board(kept("root", Path(board_module.__file__), build))
    except NoBoardError as reason:
        not_tested(f"no emulated board: {reason}", fails_in_ci=True)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's."""
    with locked(HERE / "wheel.lock"):  # setuptools builds in the repository
        return build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def wheels() -> Path:
    """The wheels that it needs on the board."""
    return kept("wheels", LOCK, lambda folder: download(PYTHON, folder))


@pytest.fixture(scope="session")
def board(base: Board, wheel: Path, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A board with the project and its `[edge]` installed for the system's Python."""
    made = base.copy(tmp_path_factory.mktemp("board") / "root")
    install(wheel, PYTHON, wheels, made.path(f"/usr/local/lib/python{PYTHON}/dist-packages"))
    return made


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path / "logs") as started:
        yield started
