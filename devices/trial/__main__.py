"""python -m devices.trial: the options of the trial. `devices.trial.run` runs it."""

from __future__ import annotations

from pathlib import Path

import typer

from devices.trial.run import TrialOptions, run_trial
from fedfmsl.common.cli import application
from fedfmsl.common.options import option
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.bundle import Precision
from fedfmsl.protocol.messages import EngineChoice
from fedfmsl.transport.settings import ConnectionSettings

app = application()


@app.command()
def trial(
    name: str = typer.Option("trial", help="Name of the run; results are in runs/NAME."),
    images: Path | None = typer.Option(
        None,
        help="Folder of images or texts: DIR/<class>/… or DIR/{train,test}/<class>/… Default: photos of groceries, "
        "downloaded once.",
    ),
    classes_from_folders: bool = typer.Option(
        False, "--classes-from-folders", help="Use every class folder of --images (the default; see --classes)."
    ),
    classes: str | None = typer.Option(None, help="Use only these classes of --images, separated by commas."),
    model: str | None = typer.Option(None, help="As for export.build. Default: DINOv2 ViT-S/14, downloaded once."),
    weights: str | None = typer.Option(None, help="As for export.build; requires --model."),
    image_size: int | None = typer.Option(None, help="Pixels per side. Default: 140, or that of --model."),
    precision: Precision = typer.Option("fp32", help="As for export.build."),
    levels: int = typer.Option(3, min=1, help="Highest SAL level."),
    engine: EngineChoice = typer.Option(
        "auto", help="Engine of the devices. With ort-training, the export also writes its artifacts."
    ),
    devices: int = typer.Option(6, min=1, help="Number of devices."),
    alpha: float = typer.Option(
        0.5, min=1e-3, help="Dirichlet α of the devices' shares of each class. A smaller α makes them less equal."
    ),
    seed: int = typer.Option(0, min=0, help="Seed of the shares, the export and the run."),
    broker: str | None = typer.Option(None, help="Address of the MQTT broker. Default: an embedded broker."),
    identity: Path | None = option(ConnectionSettings, "identity"),
    insecure: bool = option(ConnectionSettings, "insecure"),
    stage1_rounds: int = typer.Option(12, min=1, help="Rounds of stage 1."),
    stage2_rounds: int = typer.Option(5, min=1, help="Rounds of stage 2."),
    round_timeout: float = typer.Option(300, min=1, help="Seconds until the round deadline."),
    memory: str | None = typer.Option(
        None, help="Memory limit of each device, like 512MB. Default: half of the machine's memory."
    ),
    baseline: bool = typer.Option(True, help="Also train every device alone, for comparison."),
) -> None:
    """Run a whole federated trial on this machine: real photos, a real backbone, a broker, N devices."""
    if classes and classes_from_folders:
        raise ConfigError("--classes and --classes-from-folders exclude each other; omit one of them")
    if (classes or classes_from_folders) and images is None:
        raise ConfigError("--classes and --classes-from-folders require --images; add --images DIR")
    if weights and model is None:
        raise ConfigError("--weights requires --model; add --model NAME")
    run_trial(
        TrialOptions(
            name=name,
            images=images,
            classes=classes.split(",") if classes else None,
            model=model,
            weights=weights,
            image_size=image_size,
            precision=precision,
            levels=levels,
            engine=engine,
            devices=devices,
            alpha=alpha,
            seed=seed,
            broker=broker,
            identity=identity,
            insecure=insecure,
            stage1_rounds=stage1_rounds,
            stage2_rounds=stage2_rounds,
            round_timeout=round_timeout,
            memory=memory,
            baseline=baseline,
        )
    )


if __name__ == "__main__":
    app()
