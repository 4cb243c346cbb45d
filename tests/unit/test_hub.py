"""Weights from the hub: one commit for all files, the cache if the hub does not answer, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

import numpy as np
import pytest
from support.bundles import IMAGE_SIZE, Built, build
from support.hub import Hub
from support.samples import CLASSES
from support.tiny_models import write_clip

from export.weights import _is_hub_reachable, load_backbone
from fedfmsl.errors import ConfigError, WeightsError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.task_bundle import TaskBundle

ROOT = Path(__file__).parents[2]
REPOSITORY = "openai/clip-vit-base-patch16"
OLD, NEW = "1" * 40, "2" * 40


class ClosingServer(ThreadingTCPServer):
    """Closes every connection at once, and counts them."""

    calls = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), BaseRequestHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def verify_request(self, *_: object) -> bool:
        self.calls += 1
        return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def closing_server() -> Iterator[ClosingServer]:
    server = ClosingServer()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each commit."""
    root = tmp_path_factory.mktemp("commits")
    return {commit: write_clip(root / commit, seed) for seed, commit in enumerate((OLD, NEW))}


@pytest.fixture(scope="module")
def hub(weights: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub()
    hub.add(REPOSITORY, weights, tags={"v1": OLD})
    yield hub
    hub.shutdown()


@pytest.fixture(scope="module")
def built_of(weights: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The expected bundle of each commit."""
    return {
        commit: build(weights[commit], tmp_path_factory.mktemp("expected") / "bundle", levels=1)
        for commit in (OLD, NEW)
    }


def run_build(
    url: str, home: Path, out: Path, *arguments: str, model: str = "clip-vit-b16"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export.build", "--model", model, "--levels", "1", "--out", str(out)]
    options = ["--image-size", str(IMAGE_SIZE), "--classes", ",".join(CLASSES), *arguments]
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *options], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def assert_same_commit(bundle: TaskBundle, expected: TaskBundle) -> None:
    """Equal weights and an equal zero-shot head: weights, tokenizer and text tower are of one commit."""
    file = "backbone.weights"
    assert bundle.manifest.files[file] == expected.manifest.files[file]
    ours, theirs = bundle.task.zero_shot, expected.task.zero_shot
    assert ours and theirs
    assert np.array_equal(ours.rows, theirs.rows)


@pytest.mark.parametrize(("revision", "commit"), [("v1", OLD), (None, NEW)])
def test_all_files_are_of_one_commit_which_the_manifest_names(
    hub: Hub,
    closing_server: ClosingServer,
    built_of: dict[str, Built],
    tmp_path: Path,
    revision: str | None,
    commit: str,
) -> None:
    hub.requests.clear()
    pin = ["--revision", revision] if revision else []
    result = run_build(hub.url, tmp_path / "home", tmp_path / "online", *pin)
    assert result.returncode == 0, result.stderr
    bundle = TaskBundle.load(tmp_path / "online")
    assert bundle.manifest.peft.revision == commit
    assert bundle.manifest.peft.base == REPOSITORY
    assert_same_commit(bundle, built_of[commit].bundle)
    requested = hub.files_requested(REPOSITORY)
    assert {revision for revision, _ in requested} <= {revision or "main", commit}
    assert {"config.json", "model.safetensors", "vocab.json", "preprocessor_config.json"} <= {
        file for _, file in requested
    }
    if revision:  # then the cache is enough if the hub does not answer
        result = run_build(closing_server.url, tmp_path / "home", tmp_path / "offline", *pin)
        assert result.returncode == 0, result.stderr
        assert "the hub does not answer" in result.stdout
        assert closing_server.calls == 1
        assert Bundle.load(tmp_path / "offline").sha256 == bundle.sha256


def test_without_hub_and_cache_the_error_comes_at_once_with_a_remedy(
    closing_server: ClosingServer, tmp_path: Path
) -> None:
    result = run_build(closing_server.url, tmp_path / "home", tmp_path / "out", model="vit-b16")
    assert closing_server.calls == 1  # the hub's client would try six times, half a minute, for each file
    assert result.returncode == WeightsError.exit_code
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: cannot fetch google/vit-base-patch16-224-in21k")
    assert "--weights FOLDER" in line and "--weights random" in line


def test_with_hf_hub_offline_the_hub_counts_as_unreachable() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not _is_hub_reachable()


def test_a_revision_that_does_not_exist_is_an_error(hub: Hub, tmp_path: Path) -> None:
    result = run_build(hub.url, tmp_path / "home", tmp_path / "out", "--revision", "v9")
    assert result.returncode == WeightsError.exit_code
    (line,) = result.stderr.strip().splitlines()
    assert f"cannot fetch {REPOSITORY} at revision v9" in line


def test_a_revision_of_random_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="--revision v1 selects a commit on the hub"):
        load_backbone("clip-vit-b16", "random", 2, None, "v1", 0)
