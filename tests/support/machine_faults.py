"""Faults of a machine: a full disk, a clock that jumps. Tests are skipped on machines that do not allow them."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.tools import not_tested, require_faketime, require_tool

BLOCK = 64 * 1024


class SmallDisk:
    """A file system of a few MB."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._ballast = root / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Writes until at most `leave` bytes are free."""
        statistics = os.statvfs(self.root)
        missing = statistics.f_bavail * statistics.f_frsize - leave
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while missing > 0:
                missing -= file.write(bytes(min(BLOCK, missing)))

    def free(self) -> None:
        self._ballast.unlink()


@contextlib.contextmanager
def small_disk(root: Path, megabytes: int) -> Iterator[SmallDisk]:
    root.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(root)]
    if os.geteuid() != 0:
        not_tested("a small disk is a mounted tmpfs, which only root may mount")
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        not_tested(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield SmallDisk(root)
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


class PrivateDisk:
    """A file system of `size` bytes at `folder` in a mount namespace of its own, for a process that is started with its
    `command`. Needs no root. Others see it below that process's root, after `seen_by`."""

    def __init__(self, folder: Path, size: int, mode: str = "rw") -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        mount = f"mount -t tmpfs -o {mode},size={size} tmpfs {folder}"
        namespaces = (require_tool("unshare"), "--user", "--map-root-user", "--mount", "sh", "-c")
        if subprocess.run([*namespaces, mount], capture_output=True, check=False).returncode:
            not_tested("no small file system can be mounted here")
        self.command = (*namespaces, f'{mount} && exec "$0" "$@"')
        self.seen_from_here = folder

    def seen_by(self, process: int) -> None:
        self.seen_from_here = Path(f"/proc/{process}/root{self.folder}")

    def fill(self) -> None:
        """Writes until not a page is free."""
        for size in (1 << 16, 1 << 12):
            try:
                with (self.seen_from_here / "ballast").open("ab", buffering=0) as file:
                    while file.write(bytes(size)) == size:
                        pass
            except OSError:
                continue

    def empty(self) -> None:
        (self.seen_from_here / "ballast").unlink()


class Clock:
    """The wall clock of processes that are started with its `environment`. Their monotonic clock is not changed."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.jump(0)
        self.environment = {
            "LD_PRELOAD": str(require_faketime()),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, seconds: float) -> None:
        """Sets the offset from the true time, also for running processes."""
        scratch = self._file.with_suffix(".new")
        scratch.write_text(f"{seconds:+.0f}\n")
        scratch.replace(self._file)
