"""A simulation on Ray gives the numbers of one process. Needs the package ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.bundles import Built
from support.processes import run_module
from support.samples import CLASSES, write_device_photos

pytest.importorskip("ray")


@pytest.fixture
def options(vit: Built, tmp_path: Path) -> list[str]:
    for split, seed in (("train", 0), ("test", 1)):
        write_device_photos(tmp_path / "photos" / split, dict.fromkeys(CLASSES, 10), seed)
    return [
        *("--bundle", str(vit.bundle.root), "--images", "photos", "--devices", "3", "--unseen", "1", "--rounds", "3"),
        *("--epochs", "1", "--alpha", "5", "--threads", "1", "--seeds", "2", "--methods", "fedfmsl,feddpa"),
    ]


@pytest.mark.parametrize("parallel", [("--ray",), ("--address", "local")], ids=["files", "object store"])
def test_cells_and_devices_in_parallel_give_the_same_numbers(
    parallel: tuple[str, ...], options: list[str], tmp_path: Path
) -> None:
    for more in (("--name", "plain"), ("--name", "parallel", *parallel)):
        ended = run_module("simulation", *options, *more, cwd=tmp_path)
        assert ended.code == 0, ended.stderr
    assert results(tmp_path / "runs" / "plain") == results(tmp_path / "runs" / "parallel")


def results(folder: Path) -> dict[str, Any]:
    """By file name, without what differs from run to run."""
    found = {path.name: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}
    assert len(found) == 4
    return {name: {**result, "device_seconds": 0} for name, result in found.items()}


def test_a_cluster_that_cannot_be_reached_is_one_line(options: list[str], tmp_path: Path) -> None:
    ended = run_module("simulation", *options, "--address", "127.0.0.1:1", cwd=tmp_path)
    assert ended.code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: --address 127.0.0.1:1: Ray cannot be reached")
