"""Errors of files that are not errors of the disk."""

from __future__ import annotations

import os
import resource

from edge_runtime.engines.memory import rss
from fedfmsl.common.files import has_descriptors


def test_exhausted_descriptors_are_told_from_a_full_disk() -> None:
    assert has_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
    try:
        assert not has_descriptors()
        assert rss() > 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(taken)
