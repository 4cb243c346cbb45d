"""Memory of this process, and the memory that it may use."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
from pathlib import Path

import psutil

_V1, _V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"
_HIGH_WATER = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)


def peak_rss() -> int:
    """Peak resident memory in bytes. Prefers /proc, because a Linux process inherits `ru_maxrss` from its parent."""
    try:
        found = _HIGH_WATER.search(Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def rss() -> int:
    """Resident memory in bytes; its peak if no file can be opened."""
    try:
        return int(psutil.Process().memory_info().rss)
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_rss_mb() -> float:
    """Peak resident memory in MiB."""
    return peak_rss() / 2**20


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory of the machine, or of the container or service if it has a limit (cgroup v2 or v1)."""
    limits = [int(psutil.virtual_memory().total)]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                mount, name = (_V1, "memory.limit_in_bytes") if controllers else (_V2, "memory.max")
                group = Path(path.strip("/"))
                # every group above limits this one; a container may see only its own, as the root
                for each in (group, *group.parents):
                    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
                        limits.append(int((root / mount / each / name).read_text()))
    return min(limits)


def release_free_memory() -> None:
    """Returns free heap memory to the system. glibc keeps it after a session is closed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
