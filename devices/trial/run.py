"""A whole federated run on this machine, with a process for every device, and its report.

It runs the commands of a deployment: export.build, trainer_server, edge_runtime. Only the distribution of one folder
to the devices, the evaluation on the test samples of all devices, and the report belong to the trial.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from devices.trial.assets import ASSETS, WEIGHTS, fetch
from devices.trial.closed_rounds import ClosedRounds
from devices.trial.dataset import find_files, kind_of
from devices.trial.evaluation import evaluate_fleet
from devices.trial.groceries import groceries
from devices.trial.processes import Processes, free_port
from devices.trial.report import write_report
from devices.trial.settings import TrialSettings
from devices.trial.shares import write_device_folders
from edge_runtime.data.inputs import Kind
from fedfmsl.common.cli import console
from fedfmsl.common.folder_walk import SkippedFile, count_files
from fedfmsl.common.onnx_runtime import require_ort_training
from fedfmsl.common.processors import usable_processors
from fedfmsl.errors import ConfigError, InputError, RunError
from fedfmsl.protocol.class_names import check_names, write_names
from fedfmsl.protocol.task_bundle import TaskBundle

IMAGE_SIZE = 140  # of the default model
MAX_REPEATS = 5  # of a round, by the server


def run_trial(settings: TrialSettings) -> None:
    """Writes runs/NAME. Raises FedFMSLError if an option is unusable or a process fails."""
    started = time.monotonic()
    if settings.engine == "ort-training":
        require_ort_training("--engine ort-training")
    folder = Path("runs") / settings.name
    samples = settings.images or groceries()
    kind = kind_of(samples)
    skipped: list[SkippedFile] = []
    train, test = find_files(samples, kind, settings.classes, skipped=skipped)
    check_names(settings.classes or list(train), "--classes" if settings.classes else f"--images {samples}")
    settings = _with_model(settings)
    _clear(folder)
    shares = settings.devices + settings.unseen
    roots = write_device_folders(train, test, folder / "samples", shares, settings.alpha, settings.seed)
    roots, unseen = roots[: settings.devices], roots[settings.devices :]
    counts = [sum(map(len, of_class.values())) for of_class in (train, test)]
    missed = count_files(skipped)
    counted = f"{counts[0]} to train on, {counts[1]} to test on{f', {missed} skipped' if missed else ''}"
    console.print(f"{kind.noun + 's':<10} {counted}")
    exporting = time.monotonic()
    names = folder / "classes.txt"  # a command line is too short for thousands of names
    write_names(names, list(train))
    _python("export.build", *_export_arguments(settings, names), "--out", str(folder / "bundle"))
    seconds = {"export": time.monotonic() - exporting}
    _check_kind(TaskBundle.load(folder / "bundle"), samples, kind)
    _federate(settings, folder, roots)
    console.print(f"evaluating every device's models on all test {kind.noun}s")
    evaluating = time.monotonic()
    evaluation = evaluate_fleet(folder, roots, unseen)
    seconds["fleet_evaluation"] = time.monotonic() - evaluating
    seconds["total"] = time.monotonic() - started
    write_report(
        folder, evaluation, seed=settings.seed, alpha=settings.alpha, seconds=seconds, used=sum(counts), skipped=missed
    )


def _with_model(settings: TrialSettings) -> TrialSettings:
    """The default model is DINOv2 ViT-S/14, rebuilt once from the downloaded ONNX file, with int8 weights."""
    if settings.model is not None:
        return settings.model_copy(update={"precision": settings.precision or "fp32"})
    precision = settings.precision or ("fp32" if settings.engine == "ort-training" else "int8")
    folder = ASSETS / "dinov2-s14"
    if not (folder / "model.safetensors").is_file():
        _python("export.rebuild", str(fetch(WEIGHTS)), str(folder))
    size = settings.image_size or IMAGE_SIZE
    chosen = {"model": "dinov2-s14", "weights": str(folder), "image_size": size, "precision": precision}
    return settings.model_copy(update=chosen)


def _export_arguments(settings: TrialSettings, names: Path) -> list[str]:
    return [
        *("--model", str(settings.model), "--classes-file", str(names), "--levels", str(settings.levels)),
        *("--seed", str(settings.seed), "--precision", str(settings.precision)),
        *(["--ort-training"] if settings.engine == "ort-training" else []),
        *(["--weights", settings.weights] if settings.weights else []),
        *(["--image-size", str(settings.image_size)] if settings.image_size else []),
    ]


def _federate(settings: TrialSettings, folder: Path, roots: Sequence[Path]) -> None:
    """Runs broker, server and devices until the run has finished."""
    access = ["--identity", str(settings.identity)] if settings.identity else []
    access += ["--insecure"] if settings.insecure else []
    with Processes(folder / "logs") as processes:
        address = settings.broker or processes.start_broker()
        console.print(f"broker     {address}{'' if settings.broker else '  (embedded)'}")
        page = f"127.0.0.1:{free_port()}"
        console.print(f"console    http://{page}/  (until the run has finished)")
        arguments = [*_server_arguments(settings, folder, address), "--console", page]
        server = processes.start("server", "trainer_server", *arguments, *access)
        for root in roots:
            processes.start(root.name, "edge_runtime", *_device_arguments(settings, folder, root, address), *access)
        processes.wait(server, ClosedRounds(folder).print_new)


def _server_arguments(settings: TrialSettings, folder: Path, broker: str) -> list[str]:
    return [
        *(
            "start",
            "--run",
            settings.name,
            "--bundle",
            str(folder / "bundle"),
            "--broker",
            broker,
            "--out",
            str(folder),
        ),
        *("--devices", str(settings.devices), "--seed", str(settings.seed)),
        *("--round-timeout", str(settings.round_timeout), "--max-repeats", str(MAX_REPEATS)),
        *("--stage1-rounds", str(settings.stage1_rounds), "--stage2-rounds", str(settings.stage2_rounds)),
        *(["--baseline"] if settings.baseline else []),
    ]


def _device_arguments(settings: TrialSettings, folder: Path, root: Path, broker: str) -> list[str]:
    threads = max(1, usable_processors() // settings.devices)
    return [
        *("run", "--run", settings.name, "--device", root.name, "--images", str(root), "--broker", broker),
        *("--state", str(folder / "devices" / root.name), "--bundle", str(folder / "bundle")),
        *("--threads", str(threads), "--engine", settings.engine),
        *(["--memory", str(int(settings.memory))] if settings.memory else []),
    ]


def _check_kind(bundle: TaskBundle, samples: Path, kind: Kind) -> None:
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
