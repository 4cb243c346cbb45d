"""The memory that a process may use, with the files of cgroups as Linux has them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from support.cgroups import write_cgroup

from edge_runtime.engines.memory import usable_memory

MACHINE = int(psutil.virtual_memory().total)
LIMIT = MACHINE // 4


@pytest.mark.parametrize(
    ("groups", "files", "usable"),
    [
        ("0::/\n", {"memory.max": str(LIMIT)}, LIMIT),
        ("0::/a.slice/b.service\n", {"a.slice/memory.max": str(LIMIT), "a.slice/b.service/memory.max": "max"}, LIMIT),
        ("5:memory:/docker/1\n0::/\n", {"memory/memory.limit_in_bytes": str(LIMIT)}, LIMIT),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, MACHINE),
        ("0::/\n", {}, MACHINE),
        (None, {}, MACHINE),
    ],
    ids=["a container", "a slice of systemd", "cgroup v1", "no limit in v1", "no limit", "no cgroups"],
)
def test_the_limit_of_a_container_or_service_counts(
    tmp_path: Path, groups: str | None, files: dict[str, str], usable: int
) -> None:
    write_cgroup(tmp_path, groups, files)
    assert usable_memory(tmp_path) == usable
