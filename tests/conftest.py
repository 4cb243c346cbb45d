"""Fixtures of every kind of test. The tiny backbones and their bundles are made once for all workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.bundles import Built, shared_bundle, shared_weights
from support.samples import write_photos, write_texts
from support.tools import require_tool, summary

# no test may fail because the machine is slow
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

LONG_FILES = (  # of 10 s or more, by `pytest --durations`
    "test_device_faults.py",
    "test_killed_server.py",
    "test_console_in_chromium.py",
    "test_device_commands.py",
    "test_killed_daemon.py",
    "test_three_nights.py",
    "test_trial_on_texts.py",
    "test_device_kill_points.py",
    "test_whole_run.py",
    "test_trial_on_photos.py",
    "test_memory_budget.py",
    "test_examples.py",
    "test_security.py",
    "test_network_faults.py",
    "test_paused_device.py",
    "test_server_kill_points.py",
    "test_user_errors.py",
    "test_build.py",
    "test_hub.py",
    "test_device_page.py",
    "test_server_memory.py",
    "test_watched_folder.py",
    "test_loop.py",
    "test_engines.py",
    "test_flooding_member.py",
    "test_killed_secure_device.py",
    "test_bundle_limits.py",
    "test_hostile_client.py",
    "test_machine_faults.py",
    "test_simulate.py",
    "test_simulate_on_ray.py",
    "test_coordinator_model.py",
    "test_probe.py",
    "test_emulated_daemon.py",
    "test_deploy_page.py",
    "test_one_gigabyte.py",
)

# Also for the processes that tests start, which are hundreds:
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the hub
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of them would compile every module of ours, 0.2 s


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the long form of tests/faults (make faults)")
    parser.addoption("--screenshots", metavar="FOLDER", help="write the screenshots of web pages that docs/ has")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*programs): programs without which the test cannot run (support.tools)")
    config.addinivalue_line("markers", "ort_training: runs once more with onnxruntime-training (make test)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: no worker then starts one when the other has nothing left to do."""
    order = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(tryfirst=True)  # before fixtures use the programs
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for program in marker.args:
            require_tool(program)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    line = summary(report.longrepr[-1] for report in terminalreporter.stats.get("skipped", []))
    if line:
        terminalreporter.write_line(line, yellow=True)


@pytest.fixture(scope="session")
def vit_folder() -> Path:
    """A tiny random ViT as a transformers folder."""
    return shared_weights("vit")


@pytest.fixture(scope="session")
def dinov2_folder() -> Path:
    """A tiny random DINOv2 as a transformers folder. Its bundle needs interpolated positions."""
    return shared_weights("dinov2")


@pytest.fixture(scope="session")
def clip_folder() -> Path:
    """A tiny random CLIP as a transformers folder."""
    return shared_weights("clip")


@pytest.fixture(scope="session")
def bert_folder() -> Path:
    """A tiny random BERT, with its tokenizer, as a transformers folder."""
    return shared_weights("bert")


@pytest.fixture(scope="session")
def vit() -> Built:
    return shared_bundle("vit")


@pytest.fixture(scope="session")
def dinov2() -> Built:
    return shared_bundle("dinov2")


@pytest.fixture(scope="session")
def deit() -> Built:
    return shared_bundle("deit")


@pytest.fixture(scope="session")
def clip() -> Built:
    return shared_bundle("clip")


@pytest.fixture(scope="session")
def bert() -> Built:
    return shared_bundle("bert")


@pytest.fixture(scope="session", params=["vit", "dinov2", "deit", "clip", "bert"])
def built(request: pytest.FixtureRequest) -> Built:
    """The bundle of each family in turn."""
    return shared_bundle(request.param)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photos of each class. Read only: copy it to change it."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten texts of each class. Read only: copy it to change it."""
    return write_texts(tmp_path_factory.mktemp("texts"))
