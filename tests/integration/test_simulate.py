"""`fedfmsl simulate` from end to end: real photos, real ONNX Runtime, on a tiny backbone."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.bundles import Built
from support.processes import run_module
from support.samples import CLASSES, write_device_photos

from fedfmsl.common.settings import read_settings
from simulation.results import as_csv
from trainer_server.settings import ServerSettings

COUNTS = dict.fromkeys(CLASSES, 10)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for split, seed in (("train", 0), ("test", 1)):
        write_device_photos(folder / split, COUNTS, seed)
    return folder


def options(built: Built, photos: Path, *more: str) -> list[str]:
    return [
        *("--bundle", str(built.bundle.root), "--images", str(photos), "--devices", "3", "--unseen", "1"),
        *("--rounds", "3", "--epochs", "1", "--max-level", "1", "--threads", "1"),
        *(more if {"--alpha", "--partition"} & {*more} else ("--alpha", "5", *more)),
    ]


@pytest.fixture(scope="module")
def done(vit: Built, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where a simulation of two seeds has run."""
    folder = tmp_path_factory.mktemp("done")
    ended = run_module("simulation", *options(vit, photos, "--seeds", "2"), cwd=folder)
    assert ended.code == 0, ended.stderr
    return folder


def test_the_table_has_a_line_for_each_model_and_seed(done: Path) -> None:
    lines = list(csv.DictReader((done / "runs" / "simulation" / "results.csv").open()))
    assert {line["seed"] for line in lines} == {"0", "1"}
    assert {"fedfmsl", "global", "start"} <= {line["model"] for line in lines}
    for line in lines:
        assert 0 <= float(line["own"]) <= 1
        assert 0 <= float(line["unseen"]) <= 1
        assert float(line["kilobytes_up"]) > 0
        assert float(line["device_seconds"]) > 0
    report = (done / "runs" / "simulation" / "report.html").read_text()
    assert report.count("data:image/svg+xml") == 2
    assert not list((done / "runs" / "simulation").glob("states"))


def test_the_best_setting_is_a_configuration_of_the_server(done: Path, vit: Built) -> None:
    found = read_settings(ServerSettings, done / "runs" / "simulation" / "server.toml", environment=False)
    assert (found.devices, found.stage1_rounds, found.stage2_rounds, found.epochs) == (3, 2, 1, 1)
    assert found.run_config(vit.bundle).stage1.learning_rate == found.learning_rate


def test_a_killed_simulation_continues_and_gives_the_same_table(
    done: Path, vit: Built, photos: Path, tmp_path: Path
) -> None:
    results = tmp_path / "runs" / "simulation" / "results"
    command = [sys.executable, "-m", "simulation", *options(vit, photos, "--seeds", "2")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(results.glob("*.json")) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    first = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert len(first) == 1
    ended = run_module("simulation", *options(vit, photos, "--seeds", "2"), cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    assert all(path.stat().st_mtime_ns == at for path, at in first.items())
    assert table(tmp_path) == table(done)


def table(folder: Path) -> str:
    """Without what differs from run to run: the seconds."""
    paths = sorted((folder / "runs" / "simulation" / "results").glob("*.json"))
    return as_csv([{**json.loads(path.read_text()), "device_seconds": 0.0} for path in paths])


def test_a_parquet_file_gives_the_numbers_of_its_folder(done: Path, vit: Built, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        files = sorted((photos / split).rglob("*.jpg"))
        labels = [path.parent.name for path in files]
        rows = {"photo": [path.read_bytes() for path in files], "label": labels}
        pyarrow.parquet.write_table(pyarrow.table(rows), data / f"{split}-0.parquet")
    given = options(vit, photos, "--seeds", "2")
    given[given.index("--images")], given[given.index(str(photos))] = "--dataset", str(data)
    ended = run_module("simulation", *given, cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    assert table(tmp_path) == table(done)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        (("--methods", "fedmagic"), ("--methods 'fedmagic': no such method", "choose from")),
        (("--images", "missing"), ("--images folder missing does not exist",)),
        (("--alpha", "0.001", "--devices", "12"), ("would have fewer than 2 training samples; use a larger --alpha",)),
        (("--partition", "pathological", "--classes-per-device", "9"), ("--classes-per-device 9 is more than 4",)),
        (("--dataset", "missing.parquet"), ("--images DIR or --dataset NAME, and not both",)),
        (("--fraction", "2"), ("--fraction '2' is too large",)),
    ],
)
def test_a_user_error_is_one_line(
    changed: tuple[str, ...], parts: tuple[str, ...], vit: Built, photos: Path, tmp_path: Path
) -> None:
    ended = run_module("simulation", *options(vit, photos, *changed), cwd=tmp_path)
    assert ended.code in (2, 3)
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


def test_a_class_that_the_bundle_lacks_is_named(vit: Built, photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    shutil.copytree(data / "train" / "apple", data / "train" / "quince")
    ended = run_module("simulation", *options(vit, data), cwd=tmp_path)
    assert ended.code == 3
    assert "'quince', which the task does not have" in ended.stderr
    assert "--classes apple,kiwi,lemon,plum,quince" in ended.stderr
