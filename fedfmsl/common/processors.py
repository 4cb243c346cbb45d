"""How many processors this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_V1, _V2 = "sys/fs/cgroup/cpu", "sys/fs/cgroup"


def usable_processors(root: Path = Path("/")) -> int:
    """The processors of the machine, or fewer in a container or service with a limit: of its processors (affinity), or
    of their time (cgroup v2 or v1), rounded up. At least 1."""
    counts = [len(os.sched_getaffinity(0))]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                group = Path(path.strip("/"))
                # every group above limits this one; a container may see only its own, as the root
                for each in (group, *group.parents):
                    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
                        counts.append(_count(root, each, v2=not controllers))
    return max(min(counts), 1)


def _count(root: Path, group: Path, v2: bool) -> int:
    """Raises OSError or ValueError if the group has no limit."""
    if v2:
        quota, period = map(int, (root / _V2 / group / "cpu.max").read_text().split())
    else:
        quota, period = (int((root / _V1 / group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    if quota <= 0 or period <= 0:  # v1: -1, no limit
        raise ValueError("no limit")
    return math.ceil(quota / period)
