"""A member of a provisioned fleet floods broker and server: both stay within their memory, and it is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.floods import assert_survived, flood, flooded, memory
from support.processes import Processes

pytestmark = pytest.mark.needs("mosquitto")


def test_a_member_that_floods_is_named_and_ignored_and_its_retained_messages_removed(
    bundle: Path, tmp_path: Path
) -> None:
    with Processes(tmp_path / "logs") as processes:
        assert_survived(flooded(processes, bundle, tmp_path), seconds=3.0)


def test_what_waits_for_a_server_that_does_not_read_is_bounded(bundle: Path, tmp_path: Path) -> None:
    with Processes(tmp_path / "logs") as processes:
        scene = flooded(processes, bundle, tmp_path, queued_bytes=30_000_000)
        scene.server.pause()
        assert flood(scene, seconds=3.0) * 98_000 > 90_000_000
        assert memory(scene.broker, peak=True) < 90  # twice the queue, and a margin
        scene.server.resume()
