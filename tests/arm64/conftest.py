"""An emulated board with this project installed on it; where there can be none, every test here is skipped and says
why."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from board import HERE, PACKAGES, PYTHON, SUITE, Board, NoBoardError, build, require_emulation
from processes import MOSQUITTO, Processes
from wheels import REPOSITORY, build_wheel, download, install


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@pytest.fixture(scope="session")
def base() -> Board:
    """The system, with nothing of ours on it. Made once and kept; read only: copy it to change it."""
    if MOSQUITTO is None:
        pytest.skip("mosquitto is not installed (make test-arm64 installs it with apt-get)")
    try:
        require_emulation()
        source = Path(build.__code__.co_filename).read_text()
        folder = HERE / f"root-{_key(SUITE, *PACKAGES, source)}"
        return Board(folder) if folder.exists() else build(folder)
    except NoBoardError as reason:
        pytest.skip(f"no emulated board: {reason}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's."""
    return build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def wheels(wheel: Path) -> Path:
    """A folder of what it needs on the board. Downloaded once and kept until pyproject.toml changes."""
    folder = HERE / f"wheels-{_key(PYTHON, (REPOSITORY / 'pyproject.toml').read_text())}"
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        download(wheel, PYTHON, unfinished)
        unfinished.rename(folder)
    return folder


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
