"""A whole federated run on this machine, with a process for every device, and its report.

It runs the commands of a deployment: export.build, trainer_server, edge_runtime. Only the distribution of one folder
to the devices, and the report, belong to the trial.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from devices.trial.assets import ASSETS, PHOTOS, WEIGHTS, fetch
from devices.trial.dataset import find_files, kind_of
from devices.trial.groceries import unpack_groceries
from devices.trial.live_view import LiveView
from devices.trial.processes import Processes
from devices.trial.report import write_report
from devices.trial.shares import write_device_folders
from edge_runtime.data.inputs import Kind
from fedfmsl.common.cli import console
from fedfmsl.common.onnx_runtime import require_ort_training
from fedfmsl.common.settings import byte_size
from fedfmsl.errors import ConfigError, InputError, RunError
from fedfmsl.protocol.bundle import Bundle, Precision
from fedfmsl.protocol.messages import EngineChoice
from fedfmsl.protocol.topics import check_name

IMAGE_SIZE = 140  # of the default model
MAX_REPEATS = 5  # of a round, by the server


@dataclass(frozen=True)
class TrialOptions:
    """Options of the command. `devices.trial.__main__` declares their defaults and help."""

    name: str
    images: Path | None
    classes: list[str] | None
    model: str | None
    weights: str | None
    image_size: int | None
    precision: Precision
    levels: int
    engine: EngineChoice
    devices: int
    alpha: float
    seed: int
    broker: str | None
    identity: Path | None
    insecure: bool
    stage1_rounds: int
    stage2_rounds: int
    round_timeout: float
    memory: str | None
    baseline: bool


def run_trial(options: TrialOptions) -> None:
    """Writes runs/NAME. Raises FedFMSLError if an option is unusable or a process fails."""
    started = time.monotonic()
    if options.engine == "ort-training":
        require_ort_training("--engine ort-training")
    byte_size("--memory", options.memory)
    folder = Path("runs") / check_name("run", options.name)
    samples = options.images or unpack_groceries(fetch(PHOTOS), ASSETS / "groceries")
    kind = kind_of(samples)
    train, test = find_files(samples, kind, options.classes)
    options = _with_model(options)
    _clear(folder)
    roots = write_device_folders(train, test, folder / "samples", options.devices, options.alpha, options.seed)
    counts = [sum(map(len, of_class.values())) for of_class in (train, test)]
    console.print(f"{kind.noun + 's':<10} {counts[0]} to train on, {counts[1]} to test on")
    exporting = time.monotonic()
    _python("export.build", *_export_arguments(options, list(train)), "--out", str(folder / "bundle"))
    seconds = {"export": time.monotonic() - exporting}
    _check_kind(Bundle.load(folder / "bundle"), samples, kind)
    _federate(options, folder, roots)
    for root in roots:
        shutil.rmtree(folder / "devices" / root.name / "cache", ignore_errors=True)
    seconds["total"] = time.monotonic() - started
    write_report(folder, seed=options.seed, alpha=options.alpha, seconds=seconds)


def _with_model(options: TrialOptions) -> TrialOptions:
    """The default model is DINOv2 ViT-S/14, rebuilt once from the downloaded ONNX file."""
    if options.model is not None:
        return options
    folder = ASSETS / "dinov2-s14"
    if not (folder / "model.safetensors").is_file():
        _python("export.rebuild", str(fetch(WEIGHTS)), str(folder))
    size = options.image_size or IMAGE_SIZE
    return replace(options, model="dinov2-s14", weights=str(folder), image_size=size)


def _export_arguments(options: TrialOptions, classes: Sequence[str]) -> list[str]:
    return [
        *("--model", str(options.model), "--classes", ",".join(classes), "--levels", str(options.levels)),
        *("--seed", str(options.seed), "--precision", options.precision),
        *(["--ort-training"] if options.engine == "ort-training" else []),
        *(["--weights", options.weights] if options.weights else []),
        *(["--image-size", str(options.image_size)] if options.image_size else []),
    ]


def _federate(options: TrialOptions, folder: Path, roots: Sequence[Path]) -> None:
    """Runs broker, server and devices until the run has finished."""
    access = ["--identity", str(options.identity)] if options.identity else []
    access += ["--insecure"] if options.insecure else []
    with Processes(folder / "logs") as processes:
        address = options.broker or processes.start_broker()
        console.print(f"broker     {address}{'' if options.broker else '  (embedded)'}")
        server = processes.start("server", "trainer_server", *_server_arguments(options, folder, address), *access)
        for root in roots:
            processes.start(root.name, "edge_runtime", *_device_arguments(options, folder, root, address), *access)
        with LiveView(address, options.name, folder, options.identity, options.insecure) as view:
            processes.wait(server, view.refresh)


def _server_arguments(options: TrialOptions, folder: Path, broker: str) -> list[str]:
    return [
        *("start", "--run", options.name, "--bundle", str(folder / "bundle"), "--broker", broker, "--out", str(folder)),
        *("--devices", str(options.devices), "--seed", str(options.seed)),
        *("--round-timeout", str(options.round_timeout), "--max-repeats", str(MAX_REPEATS)),
        *("--stage1-rounds", str(options.stage1_rounds), "--stage2-rounds", str(options.stage2_rounds)),
        *(["--baseline"] if options.baseline else []),
    ]


def _device_arguments(options: TrialOptions, folder: Path, root: Path, broker: str) -> list[str]:
    threads = max(1, (os.cpu_count() or 1) // options.devices)
    return [
        *("run", "--run", options.name, "--device", root.name, "--images", str(root), "--broker", broker),
        *("--state", str(folder / "devices" / root.name), "--bundle", str(folder / "bundle")),
        *("--threads", str(threads), "--engine", options.engine),
        *(["--memory", options.memory] if options.memory else []),
    ]


def _check_kind(bundle: Bundle, samples: Path, kind: Kind) -> None:
    manifest = bundle.manifest
    if manifest.preprocessing.kind != kind.noun:
        raise InputError(
            f"{samples} holds {kind.noun}s, but model {manifest.model} takes {manifest.preprocessing.kind}s; "
            "choose another --model"
        )


def _python(*arguments: str) -> None:
    """Raises RunError if the module fails. The module prints its own error."""
    result = subprocess.run([sys.executable, "-m", *arguments], check=False)
    if result.returncode:
        raise RunError(f"python -m {arguments[0]} failed with exit code {result.returncode}; see its error above")


def _clear(folder: Path) -> None:
    """Removes an earlier run of this name. Raises ConfigError if the folder is not the folder of a trial."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "samples").is_dir():
            raise ConfigError(f"{folder} exists and is not a trial; choose another --name")
        shutil.rmtree(folder)
