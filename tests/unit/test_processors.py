"""The processors that a process may use, with the files of cgroups as Linux has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.cgroups import write_cgroup

from fedfmsl.common.processors import usable_processors

V1 = "2:cpu,cpuacct:/docker/abc\n1:memory:/docker/abc\n0::/docker/abc\n"


@pytest.mark.parametrize(
    ("groups", "files", "count"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/system.slice/fedfmsl.service\n", {"system.slice/fedfmsl.service/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "100000 100000\n"}, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        (None, {}, 8),
    ],
    ids=["a container", "a service", "a group above", "cgroup v1", "no limit in v1", "no limit", "more", "no cgroups"],
)
def test_a_quota_of_a_container_or_service_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str | None, files: dict[str, str], count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write_cgroup(tmp_path, groups, files)
    assert usable_processors(tmp_path) == count
