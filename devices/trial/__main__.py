"""python -m devices.trial: a whole federated run on this machine, every device a process of its own.

It composes what can also be used by hand: export.build, trainer_server, edge_runtime. It adds the split of one folder
of photos or texts among devices, and the report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import typer

from devices.trial.assets import ASSETS, PHOTOS, WEIGHTS, fetch
from devices.trial.dataset import find_files, kind_of
from devices.trial.fleet import Fleet
from devices.trial.live import LiveView
from devices.trial.photos import unpack_groceries
from devices.trial.report import write_report
from devices.trial.split import write_fleet
from edge_runtime.data.inputs import Kind
from fedfmsl.common.cli import application, console
from fedfmsl.common.onnx_runtime import require_ort_training
from fedfmsl.common.options import option
from fedfmsl.common.settings import byte_size
from fedfmsl.errors import ConfigError, InputError, RunError
from fedfmsl.protocol.bundle import Bundle, Precision
from fedfmsl.protocol.messages import EngineChoice
from fedfmsl.protocol.topics import check_name
from fedfmsl.transport.settings import ConnectionSettings

app = application("Run a whole federated trial on this machine: real photos, a real backbone, a broker, N devices.")


@app.command()
def trial(
    name: str = typer.Option("trial", help="The run's name; everything is written to runs/NAME."),
    images: Path | None = typer.Option(
        None, help="Own photos, or texts: DIR/<class>/… or DIR/{train,test}/<class>/… Default: groceries, fetched once."
    ),
    classes_from_folders: bool = typer.Option(
        False, "--classes-from-folders", help="Every subfolder of --images is a class (the default; see --classes)."
    ),
    classes: str | None = typer.Option(None, help="Only these classes of --images, separated by commas."),
    model: str | None = typer.Option(None, help="As for export.build. Default: DINOv2 ViT-S/14, fetched once."),
    weights: str | None = typer.Option(None, help="As for export.build; goes with --model."),
    image_size: int | None = typer.Option(None, help="Pixels per side. Default: 140, or --model's own."),
    precision: Precision = typer.Option("fp32", help="As for export.build."),
    levels: int = typer.Option(3, min=1, help="Highest SAL level."),
    engine: EngineChoice = typer.Option("auto", help="What trains on the devices; ort-training is also exported for."),
    devices: int = typer.Option(6, min=1),
    alpha: float = typer.Option(0.5, min=1e-3, help="Dirichlet α of the devices' shares: smaller is more unequal."),
    seed: int = typer.Option(0, min=0),
    broker: str | None = typer.Option(None, help="As for the server. Default: an embedded broker."),
    identity: Path | None = option(ConnectionSettings, "identity"),
    insecure: bool = option(ConnectionSettings, "insecure"),
    stage1_rounds: int = typer.Option(12, min=1),
    stage2_rounds: int = typer.Option(5, min=1),
    round_timeout: float = typer.Option(300, min=1, help="Seconds after which a round ends without the missing."),
    memory: str | None = typer.Option(
        None, help="Memory each device may take, like 512MB. Default: as edge_runtime's."
    ),
    baseline: bool = typer.Option(True, help="Also train every device alone, for comparison."),
) -> None:
    started = time.monotonic()
    if classes and classes_from_folders:
        raise ConfigError("--classes and --classes-from-folders exclude each other")
    if (classes or classes_from_folders) and images is None:
        raise ConfigError("--classes and --classes-from-folders go with --images")
    if engine == "ort-training":
        require_ort_training("--engine ort-training")
    byte_size("--memory", memory)
    if weights and model is None:
        raise ConfigError("--weights goes with --model")
    folder = Path("runs") / check_name("run", name)
    samples = images or unpack_groceries(fetch(PHOTOS), ASSETS / "groceries")
    kind = kind_of(samples)
    train, test = find_files(samples, kind, classes.split(",") if classes else None)
    if model is None:
        model, weights, image_size = "dinov2-s14", str(_dinov2()), image_size or 140
    _clear(folder)
    roots = write_fleet(train, test, folder / "samples", devices, alpha, seed)
    counts = [sum(map(len, of_class.values())) for of_class in (train, test)]
    console.print(f"{kind.noun + 's':<10} {counts[0]} to train on, {counts[1]} to test on")
    options = _options(list(train), model, weights, image_size, levels, precision, engine, seed)
    seconds = {"export": _export(folder / "bundle", options)}
    _check_kind(Bundle.load(folder / "bundle"), samples, kind)
    access = [*(["--identity", str(identity)] if identity else []), *(["--insecure"] if insecure else [])]
    threads = str(max(1, (os.cpu_count() or 1) // devices))
    with Fleet(folder / "logs") as fleet:
        address = broker or fleet.start_broker()
        console.print(f"broker     {address}{'' if broker else '  (embedded)'}")
        server = fleet.start(
            "server",
            "trainer_server",
            *("start", "--run", name, "--bundle", str(folder / "bundle"), "--broker", address, "--out", str(folder)),
            *("--devices", str(devices), "--seed", str(seed), "--round-timeout", str(round_timeout)),
            *("--max-repeats", "5"),
            *("--stage1-rounds", str(stage1_rounds), "--stage2-rounds", str(stage2_rounds)),
            *(["--baseline"] if baseline else []),
            *access,
        )
        for root in roots:
            fleet.start(
                root.name,
                "edge_runtime",
                *("run", "--run", name, "--device", root.name, "--images", str(root), "--broker", address),
                *("--state", str(folder / "devices" / root.name), "--bundle", str(folder / "bundle")),
                *("--threads", threads, "--engine", engine, *(["--memory", memory] if memory else [])),
                *access,
            )
        with LiveView(address, name, folder, identity, insecure) as view:
            fleet.wait(server, view.refresh)
    for root in roots:
        shutil.rmtree(folder / "devices" / root.name / "cache", ignore_errors=True)
    seconds["total"] = time.monotonic() - started
    write_report(folder, seed=seed, alpha=alpha, seconds=seconds)


def _dinov2() -> Path:
    """The transformers folder of the trial's backbone, rebuilt once from the fetched ONNX file."""
    folder = ASSETS / "dinov2-s14"
    if not (folder / "model.safetensors").is_file():
        _python("export.rebuild", str(fetch(WEIGHTS)), str(folder))
    return folder


def _options(
    classes: list[str],
    model: str,
    weights: str | None,
    image_size: int | None,
    levels: int,
    precision: Precision,
    engine: EngineChoice,
    seed: int,
) -> list[str]:
    """The command line of export.build."""
    options = ["--model", model, "--classes", ",".join(classes), "--levels", str(levels), "--seed", str(seed)]
    options += ["--precision", precision]
    options += ["--ort-training"] if engine == "ort-training" else []
    options += ["--weights", weights] if weights else []
    options += ["--image-size", str(image_size)] if image_size else []
    return options


def _export(out: Path, options: list[str]) -> float:
    """Seconds it took."""
    started = time.monotonic()
    _python("export.build", *options, "--out", str(out))
    return time.monotonic() - started


def _check_kind(bundle: Bundle, samples: Path, kind: Kind) -> None:
    manifest = bundle.manifest
    if manifest.preprocessing.kind != kind.noun:
        raise InputError(
            f"{samples} holds {kind.noun}s, but model {manifest.model} takes {manifest.preprocessing.kind}s; "
            "choose another --model"
        )


def _python(*arguments: str) -> None:
    """Raises RunError if the module fails; it has said why itself."""
    result = subprocess.run([sys.executable, "-m", *arguments], check=False)
    if result.returncode:
        raise RunError(f"python -m {arguments[0]} failed with exit code {result.returncode}")


def _clear(folder: Path) -> None:
    """Removes an earlier run of this name. Raises ConfigError if something else is there."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "samples").is_dir():
            raise ConfigError(f"{folder} holds something that is not a trial; choose another --name")
        shutil.rmtree(folder)


if __name__ == "__main__":
    app()
