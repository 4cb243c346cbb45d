"""The server's memory does not grow with the number of devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.load import measure
from fedfmsl.protocol.task_bundle import TaskBundle

FEW, MANY = 10, 120
ROUNDS = 2


@pytest.mark.needs("mosquitto")
def test_peak_memory_with_many_devices_is_that_with_a_few(layout: TaskBundle, tmp_path: Path) -> None:
    few, many = (measure(tmp_path, layout.root, devices, ROUNDS, []) for devices in (FEW, MANY))
    assert many.processes["server"].peak_rss_mb < 1.2 * few.processes["server"].peak_rss_mb
