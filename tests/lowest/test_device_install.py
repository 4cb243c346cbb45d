"""The lowest versions that pyproject.toml allows on a device. `make test-lowest` runs this where they are installed."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from importlib import import_module

import pytest

import edge_runtime
import fedfmsl

OTHERS = {"fedfmsl.algorithms.accounting", "fedfmsl.common.scatter"}  # of the server, and of the trial


@pytest.mark.parametrize("package", [fedfmsl, edge_runtime], ids=lambda package: package.__name__)
def test_every_module_of_a_device_can_be_imported(package: object) -> None:
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")  # type: ignore[attr-defined]
    for module in found:
        if module.name not in OTHERS and not module.name.endswith("__main__"):
            import_module(module.name)


@pytest.mark.parametrize("command", ["run", "check", "predict", "status"])
def test_every_command_of_a_device_starts(command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "edge_runtime", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
