"""How much memory this process takes, and how to make it less."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from pathlib import Path

_HIGH_WATER = re.compile(r"^VmHWM:\s*(\d+) kB$", re.MULTILINE)
_STATM = Path("/proc/self/statm")


def peak_rss() -> int:
    """Peak resident memory in bytes. A new process inherits its parent's `ru_maxrss` on Linux, so /proc goes first."""
    try:
        found = _HIGH_WATER.search(Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def rss() -> int:
    """Resident memory in bytes; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak_rss_mb() -> float:
    return peak_rss() / 2**20


def release_free_memory() -> None:
    """Gives memory that is free inside this process back to the system: glibc keeps it after a session is closed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
