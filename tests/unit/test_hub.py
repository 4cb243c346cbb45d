"""Weights from the hub: one commit for all files, the cache if the hub does not answer, errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.bundles import IMAGE_SIZE, Built, build
from support.hub import Hub
from support.samples import CLASSES
from support.tiny_models import write_clip
from support.warm_python import Ended, WarmPython

from export.weights import _is_hub_reachable, load_backbone
from fedfmsl.errors import ConfigError, WeightsError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.task_bundle import TaskBundle

REPOSITORY = "openai/clip-vit-base-patch16"
OLD, NEW = "1" * 40, "2" * 40


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


@pytest.fixture(scope="module")
def python(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmPython]:
    """Its hub is `hub`, and its cache is empty at first."""
    home = str(tmp_path_factory.mktemp("home"))
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
    with WarmPython("export.pipeline", environment=environment) as python:
        yield python


@contextmanager
def silence(hub: Hub) -> Iterator[None]:
    """The hub answers no request. Its list of requests begins anew."""
    hub.requests.clear()
    hub.silent = True
    yield
    hub.silent = False


def run_build(python: WarmPython, out: Path, *arguments: str, model: str = "clip-vit-b16") -> Ended:
    options = ["--image-size", str(IMAGE_SIZE), "--classes", ",".join(CLASSES), "--levels", "1"]
    return python.run("export.build", "--model", model, "--out", str(out), *options, *arguments)


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
    python: WarmPython,
    built_of: dict[str, Built],
    tmp_path: Path,
    revision: str | None,
    commit: str,
) -> None:
    hub.requests.clear()
    pin = ["--revision", revision] if revision else []
    ended = run_build(python, tmp_path / "online", *pin)
    assert ended.code == 0, ended.stderr
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
        with silence(hub):
            ended = run_build(python, tmp_path / "offline", *pin)
        assert ended.code == 0, ended.stderr
        assert "the hub does not answer" in ended.stdout
        assert len(hub.requests) == 1
        assert Bundle.load(tmp_path / "offline").sha256 == bundle.sha256


def test_without_hub_and_cache_the_error_comes_at_once_with_a_remedy(
    hub: Hub, python: WarmPython, tmp_path: Path
) -> None:
    with silence(hub):
        ended = run_build(python, tmp_path / "out", model="vit-b16")
    assert len(hub.requests) == 1  # the hub's client would try six times, half a minute, for each file
    remedies = ("--weights FOLDER", "--weights random")
    ended.assert_error(WeightsError.exit_code, "cannot fetch google/vit-base-patch16-224-in21k", *remedies)


def test_with_hf_hub_offline_the_hub_counts_as_unreachable() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not _is_hub_reachable()


def test_a_revision_that_does_not_exist_is_an_error(python: WarmPython, tmp_path: Path) -> None:
    ended = run_build(python, tmp_path / "out", "--revision", "v9")
    ended.assert_error(WeightsError.exit_code, f"cannot fetch {REPOSITORY} at revision v9")


def test_a_revision_of_random_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="--revision v1 selects a commit on the hub"):
        load_backbone("clip-vit-b16", "random", 2, None, "v1", 0)
