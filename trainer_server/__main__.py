"""python -m trainer_server: coordinates one run."""

from __future__ import annotations

from pathlib import Path

import typer

from protocol.bundle import Bundle
from protocol.errors import ConfigError
from protocol.messages import Sal, Training, Trigger
from protocol.topics import check_name
from shell.cli import BROKER, IDENTITY, INSECURE, application, console
from trainer_server.artifacts import ArtifactServer
from trainer_server.config import Head, RunConfig
from trainer_server.service import Service

app = application("Coordinate a federated run: both stages of FedFMSL, over MQTT.")


@app.command()
def serve(
    run: str = typer.Option(help="The run's name; devices give the same."),
    bundle: Path = typer.Option(help="The bundle's folder."),
    devices: int = typer.Option(min=1, help="Devices to wait for before the run starts."),
    broker: str = BROKER,
    identity: Path | None = IDENTITY,
    insecure: bool = INSECURE,
    out: Path | None = typer.Option(None, help="Folder of the run. Default: runs/RUN/server."),
    serve: str | None = typer.Option(None, help="HOST:PORT to serve the bundle on, for devices that have none."),
    min_updates: int = typer.Option(1, min=1, help="Updates without which a round is repeated."),
    join_timeout: float = typer.Option(600, min=1, help="Seconds to wait for devices; then start with those there."),
    round_timeout: float = typer.Option(600, min=1, help="Seconds after which a round ends without the missing."),
    stage1_rounds: int = typer.Option(12, min=1),
    stage2_rounds: int = typer.Option(5, min=1),
    epochs: int = typer.Option(2, min=1, help="Local epochs per round of stage 1."),
    batch_size: int = typer.Option(16, min=1),
    learning_rate: float = typer.Option(2e-3, min=1e-9, help="AdamW's in stage 1."),
    local_learning_rate: float = typer.Option(5e-4, min=1e-9, help="AdamW's in stage 2."),
    sal: Trigger = typer.Option(Trigger.CAPABILITY_QUEUE, help="When to activate more blocks."),
    max_level: int | None = typer.Option(None, min=1, help="Highest level. Default: the bundle's."),
    epsilon: float = typer.Option(0.02, min=0, help="Relative gain below which SAL activates more blocks."),
    head: Head = typer.Option(Head.CLASS_MEANS, help="What stage 1 starts from; zero-shot is for a bundle of CLIP."),
    baseline: bool = typer.Option(False, help="Also let every device train alone, for comparison."),
    seed: int = typer.Option(0),
) -> None:
    """Coordinate one run until it is finished."""
    opened = Bundle(bundle)
    opened.verify()
    level = max_level or opened.manifest.levels
    if level > opened.manifest.levels:
        raise ConfigError(f"--max-level {level}: the bundle has levels up to {opened.manifest.levels}")
    if head is Head.ZERO_SHOT and opened.zero_shot() is None:
        raise ConfigError(
            f"--head zero-shot: the bundle of {opened.manifest.model} has no such head; build one of clip-vit-b16 with "
            "its weights, or choose class-means"
        )
    rule = Sal(trigger=sal, window=3, epsilon=epsilon, step=1, max_level=level)
    config = RunConfig(
        run=check_name("run", run),
        devices=devices,
        min_updates=min_updates,
        join_timeout=join_timeout,
        round_timeout=round_timeout,
        stage1_rounds=stage1_rounds,
        stage2_rounds=stage2_rounds,
        baseline=baseline,
        head=head,
        stage1=Training(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed),
        stage2=Training(epochs=1, batch_size=batch_size, learning_rate=local_learning_rate, seed=seed),
        stage1_sal=rule,
        stage2_sal=rule.model_copy(update={"window": 2, "epsilon": epsilon / 2}),
    )
    artifacts = ArtifactServer(bundle, serve, identity, insecure) if serve else None
    try:
        folder = out or Path("runs") / run / "server"
        Service(config, opened, broker, folder, artifacts.url if artifacts else "", identity, insecure).run()
    finally:
        if artifacts:
            artifacts.close()
    console.print("run finished")


if __name__ == "__main__":
    app()
