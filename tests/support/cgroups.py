"""The files in which the kernel states the limits of a control group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_cgroup(root: Path, groups: str | None, files: Mapping[str, str]) -> None:
    """`groups`: /proc/self/cgroup, None for none. `files`: texts by path below /sys/fs/cgroup. All below `root`."""
    if groups is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
