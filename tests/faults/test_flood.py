"""A member that floods for a minute: the memory of broker and server stays within its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.floods import assert_survived, flooded
from support.processes import Processes

from fedfmsl.protocol.task_bundle import TaskBundle

SECONDS = 60.0


@pytest.mark.needs("mosquitto")
def test_a_flood_of_a_minute(layout: TaskBundle, tmp_path: Path, full: bool) -> None:
    if not full:
        pytest.skip("in the long form only (--full); tests/integration/test_flooding_member.py has the short one")
    with Processes(tmp_path / "logs") as processes:
        print(assert_survived(flooded(processes, layout.root, tmp_path), SECONDS))
