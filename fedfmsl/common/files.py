"""Atomic and durable writing of files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

MAX_NAME_BYTES = 255  # of common file systems
ADDED_BYTES = 32  # that a temporary name may have more than the name of its file
NO_DESCRIPTORS = "no more files can be opened; raise the limit of open files (LimitNOFILE= of a service, ulimit -n)"
FOLDER = "is a folder"  # why a path is not the name of a file
FULL = {errno.ENOSPC, errno.EDQUOT}  # error numbers of a full disk
FAILING = {
    errno.EIO,
    errno.EROFS,
    errno.ENODEV,
    errno.ENXIO,
    errno.ESTALE,
    errno.EUCLEAN,
}  # of one that fails, or is gone
EXHAUSTED = {errno.EMFILE, errno.ENFILE}  # error numbers without a free descriptor


def has_descriptors() -> bool:
    """Whether this process can open another file. If not, errors of files and databases are no errors of the disk."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno not in EXHAUSTED
    return True


def why_no_file(path: Path) -> str:
    """Why a path is not the name of a file. "": it is one."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if stat.S_ISREG(mode):
        return ""
    return FOLDER if stat.S_ISDIR(mode) else "is neither a file nor a folder"


def write_atomically(
    path: Path, data: bytes | Iterable[bytes], durable: bool = False, private: bool = False, keep_owner: bool = False
) -> None:
    """Writes `path` so that a reader sees either the old or all of the new bytes, also after a crash.

    `data`: the bytes, or their parts. With `durable` the file survives a power failure right after the call. With
    `private` its owner alone may read it. With `keep_owner` owner, group and mode stay those of the file that it
    replaces, if there is one. Raises OSError.
    """
    former = path.stat() if keep_owner and path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{shortened(path.name)}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)
            if former:  # before the name changes: no reader finds a file that it may not read
                os.fchown(file.fileno(), former.st_uid, former.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(former.st_mode))
            file.writelines([data] if isinstance(data, bytes) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            sync(path.parent)
    except OSError:  # often a full disk, where the temporary file takes space
        temporary.unlink(missing_ok=True)
        raise


def shortened(name: str) -> str:
    """The beginning of a file name, so that ADDED_BYTES more are not too many."""
    return os.fsdecode(os.fsencode(name)[: MAX_NAME_BYTES - ADDED_BYTES])


def sync(path: Path) -> None:
    """Makes the bytes of a file, or the names in a folder, survive a power failure. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
