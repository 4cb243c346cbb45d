"""Fixtures of integration tests: the bundle of the tiny ViT, the photos of three devices, and a broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bundles import Built, build
from support.processes import Broker, Processes
from support.samples import CLASSES, write_device_photos


@pytest.fixture(scope="session")
def bundle(vit: Built) -> Path:
    return vit.bundle.root


@pytest.fixture(scope="session")
def other_bundle(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same backbone with other bytes."""
    return build(vit_folder, tmp_path_factory.mktemp("bundles") / "other", levels=1, seed=1).bundle.root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three devices of unequal classes and sizes; device-1 has a test folder of its own."""
    folder = tmp_path_factory.mktemp("devices")
    write_device_photos(folder / "device-0", {"apple": 10, "kiwi": 10}, seed=0)
    write_device_photos(folder / "device-1" / "train", {"kiwi": 10, "lemon": 5}, seed=1)
    write_device_photos(folder / "device-1" / "test", {"kiwi": 4, "lemon": 4}, seed=2)
    write_device_photos(folder / "device-2", dict.fromkeys(CLASSES, 20), seed=3)
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """The embedded broker. Every test uses its own run name."""
    with Processes(tmp_path_factory.mktemp("broker")) as processes:
        yield processes.start_broker()
