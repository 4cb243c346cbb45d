"""What pip takes on aarch64, by its own word: nothing is downloaded, and nothing may have to be compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from wheels import for_aarch64, pip

PYTHONS = ("3.10", "3.11", "3.13")  # of JetPack 6, of Raspberry Pi OS on Debian 12 and on Debian 13
FORBIDDEN = {"torch", "transformers", "onnxruntime-gpu", "onnxruntime-training", "onnxruntime-training-cpu"}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_of_a_device_has_a_wheel(wheel: Path, python: str, tmp_path: Path) -> None:
    dry_run = ("install", "--dry-run", "--ignore-installed", f"--target={tmp_path / 'nothing'}", "--report=-")
    report = json.loads(pip(*dry_run, *for_aarch64(python), f"{wheel}[edge]"))
    files = {item["metadata"]["name"].lower(): item["download_info"]["url"] for item in report["install"]}
    assert [url for url in files.values() if not url.endswith(".whl")] == []
    assert "aarch64" in files["onnxruntime"]
    assert FORBIDDEN & files.keys() == set()
