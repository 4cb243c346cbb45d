"""Weights of the hub: one commit for every file, the cache where the hub does not answer, errors.

The hub is a server of ours that speaks as much of its protocol as its client asks for.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

import numpy as np
import pytest
from support.bundles import IMAGE_SIZE, Built, build
from support.samples import CLASSES
from support.tiny_models import write_clip

from export.weights import load_backbone
from fedfmsl.errors import ConfigError, WeightsError
from fedfmsl.protocol.bundle import Bundle

ROOT = Path(__file__).parents[2]
REPOSITORY = "openai/clip-vit-base-patch16"
OLD, NEW = "1" * 40, "2" * 40


class Hub(ThreadingHTTPServer):
    """One repository, of which `commits` are folders; the branch main is NEW, the tag v1 is OLD."""

    def __init__(self, commits: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.commits = {**commits, "main": commits[NEW], "v1": commits[OLD]}
        self.asked: list[tuple[str, str]] = []  # revision, file
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        _, _, rest = self.path.partition(f"{REPOSITORY}/resolve/")
        revision, _, name = rest.partition("/")
        if rest:
            self.server.asked.append((revision, name))
        folder = self.server.commits.get(revision)
        path = folder / name if folder else Path()
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if folder or not rest else "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", path.parent.name)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


class Mute(ThreadingTCPServer):
    """Hangs up on everyone, and counts them."""

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
def mute() -> Iterator[Mute]:
    server = Mute()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("commits")
    hub = Hub({commit: write_clip(root / commit, seed) for seed, commit in enumerate((OLD, NEW))})
    yield hub
    hub.shutdown()


@pytest.fixture(scope="module")
def built_of(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """What each commit's bundle must be."""
    return {
        commit: build(hub.commits[commit], tmp_path_factory.mktemp("wanted") / "bundle", levels=1)
        for commit in (OLD, NEW)
    }


def run_build(
    url: str, home: Path, out: Path, *arguments: str, model: str = "clip-vit-b16"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export.build", "--model", model, "--levels", "1", "--out", str(out)]
    given = ["--image-size", str(IMAGE_SIZE), "--classes", ",".join(CLASSES), *arguments]
    environment = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *given], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def assert_is(bundle: Bundle, wanted: Bundle) -> None:
    """The same weights, and the same head of class names: weights, tokenizer and text tower are of one commit."""
    file = "backbone.weights"
    assert bundle.manifest.files[file] == wanted.manifest.files[file]
    ours, theirs = bundle.zero_shot(), wanted.zero_shot()
    assert ours and theirs
    assert np.array_equal(ours.rows, theirs.rows)


@pytest.mark.parametrize(("revision", "commit"), [("v1", OLD), (None, NEW)])
def test_every_file_is_of_the_pinned_revision_which_the_manifest_names_as_a_commit(
    hub: Hub, mute: Mute, built_of: dict[str, Built], tmp_path: Path, revision: str | None, commit: str
) -> None:
    hub.asked.clear()
    pin = ["--revision", revision] if revision else []
    ended = run_build(hub.url, tmp_path / "home", tmp_path / "online", *pin)
    assert ended.returncode == 0, ended.stderr
    bundle = Bundle.load(tmp_path / "online")
    assert bundle.manifest.peft.revision == commit
    assert bundle.manifest.peft.base == REPOSITORY
    assert_is(bundle, built_of[commit].bundle)
    assert {asked for asked, _ in hub.asked} <= {revision or "main", commit}
    assert {"config.json", "model.safetensors", "vocab.json", "preprocessor_config.json"} <= {f for _, f in hub.asked}
    if revision:  # the cache is enough where the hub does not answer
        ended = run_build(mute.url, tmp_path / "home", tmp_path / "offline", *pin)
        assert ended.returncode == 0, ended.stderr
        assert "the hub does not answer" in ended.stdout
        assert mute.calls == 1
        assert Bundle.load(tmp_path / "offline").sha256 == bundle.sha256


def test_without_hub_and_cache_the_error_comes_at_once_and_says_what_to_do(mute: Mute, tmp_path: Path) -> None:
    ended = run_build(mute.url, tmp_path / "home", tmp_path / "out", model="vit-b16")
    assert mute.calls == 1  # the hub's client alone would try six times, half a minute, for each file
    assert ended.returncode == WeightsError.exit_code
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: cannot fetch google/vit-base-patch16-224-in21k")
    assert "--weights FOLDER" in line


def test_a_revision_that_does_not_exist_is_named(hub: Hub, tmp_path: Path) -> None:
    ended = run_build(hub.url, tmp_path / "home", tmp_path / "out", "--revision", "v9")
    assert ended.returncode == WeightsError.exit_code
    (line,) = ended.stderr.strip().splitlines()
    assert f"cannot fetch {REPOSITORY} at revision v9" in line


def test_a_revision_of_weights_that_are_not_the_hubs_is_refused() -> None:
    with pytest.raises(ConfigError, match="--revision v1 pins weights of the hub"):
        load_backbone("clip-vit-b16", "random", 2, None, "v1", 0)
