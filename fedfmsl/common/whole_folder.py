"""Folders that are replaced as a whole: a reader of one version never gets a file of another."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedfmsl.common.files import shortened, write_atomically
from fedfmsl.errors import ConfigError

ATTEMPTS = 5  # to read a folder that is replaced meanwhile
PAUSE = 0.02  # seconds between them, for the writer's two renames


def write_folder(folder: Path, files: Mapping[str, bytes | Iterable[bytes]]) -> None:
    """Replaces `folder` by one with these files. A name may have subfolders, like onnx/model.onnx. A crash leaves the
    old or the new folder, or none for the moment between two renames. Only one process at a time may write a folder.

    Raises OSError; the old folder then stays.
    """
    folder = folder.resolve()  # a link to a folder stays
    new, old = (folder.with_name(f".{shortened(folder.name)}.{end}") for end in ("new", "old"))
    _restore(old, folder)
    for left in (new, old):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        for name, data in files.items():
            write_atomically(new / name, data)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError:
        _restore(old, folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of one version of a folder without subfolders, by name. Hidden ones are left out. Raises OSError."""
    for attempt in range(ATTEMPTS):
        try:
            return _read(folder)
        except FileNotFoundError:  # the folder was replaced meanwhile
            if attempt + 1 == ATTEMPTS:
                raise
            time.sleep(PAUSE)
    raise AssertionError


def check_own(flag: str, folder: Path, names: Iterable[str]) -> None:
    """Raises ConfigError if `write_folder` would remove what is not one of `names`, or if `folder` is a file. `flag`
    names it in the error."""
    own = {name.partition("/")[0] for name in names}
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{flag} {folder} is a file; pass a folder")
    others = sorted(path.name for path in folder.iterdir() if path.name not in own) if folder.is_dir() else []
    if others:
        raise ConfigError(f"{flag} {folder} has other files, like {others[0]}; pass a new or an empty folder")


def _restore(old: Path, folder: Path) -> None:
    """After an end between the two renames."""
    if old.exists() and not folder.exists():
        old.rename(folder)


def _read(folder: Path) -> dict[str, bytes]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # stays with this version
    try:
        with os.scandir(descriptor) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        found = {}
        for name in names:
            with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=descriptor), "rb") as file:
                found[name] = file.read()
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):  # its files may have been removed before
            raise FileNotFoundError(errno.ENOENT, "is replaced all the time", str(folder))
        return found
    finally:
        os.close(descriptor)
