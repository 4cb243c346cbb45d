"""Folders that several test processes use and one of them makes."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """No other process holds this lock file meanwhile."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, which `make` writes if it does not exist. A folder that exists is complete: it is written under
    another name first."""
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            unfinished = folder.with_name("unfinished") / folder.name
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.parent.mkdir(exist_ok=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


@cache
def _fingerprint(sources: tuple[Path, ...], packages: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            digest.update(f"{path.name}\0".encode() + path.read_bytes())
    for package in packages:
        try:
            digest.update(f"{package} {version(package)}\0".encode())
        except PackageNotFoundError:
            continue
    return digest.hexdigest()[:16]


def fingerprint(sources: Sequence[Path], packages: Sequence[str] = ()) -> str:
    """A key that changes with the Python code below `sources` and the versions of `packages`."""
    return _fingerprint(tuple(sources), tuple(packages))
