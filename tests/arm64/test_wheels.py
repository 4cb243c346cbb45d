"""Every dependency has a wheel for aarch64, by a dry run of pip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.arm64.wheels import for_aarch64, pip

PYTHONS = ("3.10", "3.13")  # of JetPack 6, and of Raspberry Pi OS on Debian 13; Debian 12 is emulated
FORBIDDEN = {"torch", "transformers", "onnxruntime-gpu", "onnxruntime-training", "onnxruntime-training-cpu"}


def check(files: Mapping[str, str]) -> None:
    """`files`: package → file that it is installed from."""
    assert [file for file in files.values() if not file.endswith(".whl")] == []
    assert "aarch64" in files["onnxruntime"]
    assert FORBIDDEN & files.keys() == set()


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_of_a_device_has_a_wheel(wheel: Path, python: str, tmp_path: Path) -> None:
    dry_run = ("install", "--dry-run", "--ignore-installed", f"--target={tmp_path / 'nothing'}", "--report=-")
    report = json.loads(pip(*dry_run, *for_aarch64(python), f"{wheel}[edge]"))
    check({item["metadata"]["name"].lower(): item["download_info"]["url"] for item in report["install"]})


def test_the_emulated_board_has_only_wheels(wheels: Path) -> None:
    check({file.name.partition("-")[0]: file.name for file in wheels.iterdir()})
