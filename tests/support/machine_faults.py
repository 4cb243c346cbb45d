"""Faults of a machine: its disk, memory, descriptors and clock. Tests are skipped where they cannot be made."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support.processes import wait_until
from support.tools import not_tested, require_faketime, require_tool

BLOCK = 64 * 1024
SHUTDOWN, WITHOUT_THE_JOURNAL = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN and EXT4_GOING_FLAGS_NOLOGFLUSH
HOG_BYTES = 64 << 20
HOG = """
import pathlib, time
pathlib.Path("{group}/cgroup.procs").write_text("0")
taken = []
while True:
    taken.append(bytearray(b"x") * ({size} // 16))
    time.sleep(0.01)
"""


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


class JournaledDisk:
    """A journaled file system (ext4 on a loop device) whose power can fail. What was not synced is lost then."""

    def __init__(self, root: Path, image: Path) -> None:
        self.root = root
        self._image = image

    def fail(self) -> None:
        """From now on every read and write gives EIO, and nothing more reaches the disk, as after a power loss."""
        folder = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, SHUTDOWN, struct.pack("I", WITHOUT_THE_JOURNAL))
        finally:
            os.close(folder)

    def repair(self) -> None:
        """Mounts a copy of what was on the disk. The failed one cannot write any more, and is released when no mount
        namespace has it."""
        subprocess.run(["umount", "--lazy", str(self.root)], check=True)
        copy = self._image.with_suffix(".copy")
        subprocess.run(["cp", "--sparse=always", str(self._image), str(copy)], check=True)
        self._image.unlink()
        copy.rename(self._image)
        error = self.mount()
        assert not error, error

    def mount(self) -> str:
        """The error's text."""
        # nothing but fsync writes anything within the time of a test
        options = "loop,data=writeback,noauto_da_alloc,commit=300"
        mount = ["mount", "-t", "ext4", "-o", options, str(self._image), str(self.root)]
        return subprocess.run(mount, capture_output=True, text=True, check=False).stderr.strip()


@contextlib.contextmanager
def journaled_disk(root: Path, megabytes: int) -> Iterator[JournaledDisk]:
    if os.geteuid() != 0:
        not_tested("a disk whose power fails is a mounted file, which only root may mount")
    root.mkdir(parents=True, exist_ok=True)
    image = root.with_name(f"{root.name}.image")
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run([require_tool("mkfs.ext4"), "-q", "-F", str(image)], check=True, capture_output=True)
    disk = JournaledDisk(root, image)
    if error := disk.mount():
        not_tested(f"no file can be mounted here: {error}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)
        image.unlink()


@contextlib.contextmanager
def no_descriptors(process: int) -> Iterator[None]:
    """A running process may open no more files and sockets (EMFILE)."""
    before = resource.prlimit(process, resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in Path(f"/proc/{process}/fd").iterdir()}
    free = next(number for number in itertools.count() if number not in used)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def failing_calls(process: int, calls: str, error: str) -> Iterator[None]:
    """System calls of a running process fail with this error, for example pwrite64 with EIO."""
    attach = [require_tool("strace"), "-f", "-qq", "-o", "/dev/null", "-p", str(process)]
    tracer = subprocess.Popen([*attach, "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}"])
    try:
        status = Path(f"/proc/{process}/status")
        wait_until(lambda: "TracerPid:\t0" not in status.read_text() or tracer.poll() is not None, "strace is attached")
        if tracer.poll() is not None:
            not_tested("strace may not attach to a process here")
        yield
    finally:
        tracer.terminate()
        tracer.wait()


def kill_for_memory(process: int) -> None:
    """The kernel kills the process because the memory of its control group is used up (SIGKILL)."""
    root = Path("/sys/fs/cgroup/memory")  # version 1
    root = root if root.is_dir() else Path("/sys/fs/cgroup")
    group = root / f"fault-{process}"
    try:
        group.mkdir()
        limit = next(group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists())
        limit.write_text(str(HOG_BYTES))
    except (OSError, StopIteration) as error:
        not_tested(f"no control group with a limit of memory can be made here: {error}")
    # the other process of the group takes more than there is; the kernel prefers the victim
    Path(f"/proc/{process}/oom_score_adj").write_text("1000")
    (group / "cgroup.procs").write_text(str(process))
    hog = subprocess.Popen([sys.executable, "-c", HOG.format(group=group, size=HOG_BYTES)], stderr=subprocess.DEVNULL)
    try:
        state = Path(f"/proc/{process}/stat")
        wait_until(lambda: ") Z " in state.read_text(), "the kernel kills the process")
    finally:
        hog.kill()
        hog.wait()
        wait_until(lambda: not (group / "cgroup.procs").read_text().strip(), "the group is empty")
        group.rmdir()


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
