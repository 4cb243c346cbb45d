"""An emulated board with this project installed on it; where there can be none, every test here is skipped and says
why."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import support.arm64.board as board_module
from support.arm64.board import HERE, PYTHON, Board, NoBoardError, build, require_emulation
from support.arm64.wheels import REPOSITORY, build_wheel, download, install
from support.processes import MOSQUITTO, Processes


@contextmanager
def alone() -> Iterator[None]:
    """make test-arm64 runs two processes of tests; what both need, one of them makes."""
    HERE.mkdir(exist_ok=True)
    with (HERE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kept(kind: str, made_of: Path, make: Callable[[Path], object]) -> Path:
    """A folder that stays from one run to the next, until the file `made_of` changes."""
    folder = HERE / f"{kind}-{hashlib.sha256(made_of.read_bytes()).hexdigest()[:12]}"
    with alone():
        if not folder.exists():
            for old in HERE.glob(f"{kind}-*"):
                shutil.rmtree(old)
            unfinished = HERE / f"{kind}-unfinished"
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def base() -> Board:
    """The system, with nothing of ours on it. Read only: copy it to change it."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (make test-arm64 installs it with apt-get)")
    try:
        with alone():
            require_emulation()
        return Board(kept("root", Path(board_module.__file__), build))
    except NoBoardError as reason:
        pytest.skip(f"no emulated board: {reason}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's."""
    with alone():
        return build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def wheels(wheel: Path) -> Path:
    """A folder of what it needs on the board."""
    return kept("wheels", REPOSITORY / "pyproject.toml", lambda folder: download(wheel, PYTHON, folder))


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
