"""Resident memory of this process."""

from __future__ import annotations

import ctypes
import re
import resource
from pathlib import Path

import psutil

_HIGH_WATER = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)


def peak_rss() -> int:
    """Peak resident memory in bytes. Prefers /proc, because a Linux process inherits `ru_maxrss` from its parent."""
    try:
        found = _HIGH_WATER.search(Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def rss() -> int:
    """Resident memory in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_mb() -> float:
    """Peak resident memory in MiB."""
    return peak_rss() / 2**20


def release_free_memory() -> None:
    """Returns free heap memory to the system. glibc keeps it after a session is closed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
