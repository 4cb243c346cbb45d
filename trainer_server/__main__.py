"""python -m trainer_server: coordinates runs. What it tells about them is in `trainer_server.inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from fedfmsl.algorithms.privacy import Privacy
from fedfmsl.common.cli import BROKER, IDENTITY, INSECURE, application, console
from fedfmsl.common.log import set_up_log
from fedfmsl.errors import ConfigError
from fedfmsl.protocol.bundle import Bundle
from fedfmsl.protocol.messages import Encoding, Training
from fedfmsl.protocol.topics import check_name
from trainer_server.config import Aggregation, Head, Optimizer, Rule, RunConfig, Selection, Trigger, sal_of
from trainer_server.inspect import OUT, export, replay, rounds, status
from trainer_server.service.bundle_http import BundleServer
from trainer_server.service.lifecycle import open_bundle, open_run, run_server
from trainer_server.storage.run_store import RunStore

app = application("Coordinate a federated run: both stages of FedFMSL, over MQTT.")

SERVE = typer.Option(None, help="HOST:PORT to serve the bundle on, for devices that have none.")
ROUNDS, WHO, HOW, SECRET = "Rounds", "Which updates count", "How updates become one", "Privacy"


@app.command()
def start(
    run: str = typer.Option(help="The run's name; devices give the same."),
    bundle: Path = typer.Option(help="The bundle's folder."),
    devices: int = typer.Option(min=1, help="Devices to wait for before the run starts."),
    broker: str = BROKER,
    out: Path | None = typer.Option(None, help="Folder of the run. Default: runs/RUN/server."),
    serve: str | None = SERVE,
    identity: Path | None = IDENTITY,
    insecure: bool = INSECURE,
    join_timeout: float = typer.Option(
        600, min=1, help="Seconds to wait for devices; then start with those there.", rich_help_panel=ROUNDS
    ),
    round_timeout: float = typer.Option(
        600, min=1, help="Seconds after which a round ends without the missing.", rich_help_panel=ROUNDS
    ),
    stage1_rounds: int = typer.Option(12, min=1, rich_help_panel=ROUNDS),
    stage2_rounds: int = typer.Option(5, min=1, rich_help_panel=ROUNDS),
    epochs: int = typer.Option(2, min=1, help="Local epochs per round of stage 1.", rich_help_panel=ROUNDS),
    batch_size: int = typer.Option(16, min=1, rich_help_panel=ROUNDS),
    learning_rate: float = typer.Option(2e-3, min=1e-9, help="AdamW's in stage 1.", rich_help_panel=ROUNDS),
    local_learning_rate: float = typer.Option(5e-4, min=1e-9, help="AdamW's in stage 2.", rich_help_panel=ROUNDS),
    sal: Trigger = typer.Option(Trigger.CAPABILITY_QUEUE, help="When to activate more blocks.", rich_help_panel=ROUNDS),
    max_level: int | None = typer.Option(
        None, min=1, help="Highest level. Default: the bundle's.", rich_help_panel=ROUNDS
    ),
    sal_min_gain: float = typer.Option(
        0.02,
        "--sal-min-gain",
        min=0,
        help="Relative gain below which SAL activates more blocks.",
        rich_help_panel=ROUNDS,
    ),
    head: Head = typer.Option(
        Head.CLASS_MEANS,
        help="What stage 1 starts from; zero-shot is for a bundle of CLIP.",
        rich_help_panel=ROUNDS,
    ),
    baseline: bool = typer.Option(
        False, help="Also let every device train alone, for comparison.", rich_help_panel=ROUNDS
    ),
    seed: int = typer.Option(0, min=0, rich_help_panel=ROUNDS),
    min_updates: int = typer.Option(1, min=1, help="Updates without which a round is repeated.", rich_help_panel=WHO),
    max_repeats: int | None = typer.Option(
        None, min=0, help="Repeats in a row after which the run is given up. Default: never.", rich_help_panel=WHO
    ),
    enough: float = typer.Option(
        1.0, min=0.01, max=1, help="Share of the devices asked whose answers close a round.", rich_help_panel=WHO
    ),
    selection: Selection = typer.Option(
        Selection.ALL, "--select", help="Which devices a training round asks.", rich_help_panel=WHO
    ),
    fraction: float = typer.Option(
        1.0, min=0.001, max=1, help="Share that --select random draws.", rich_help_panel=WHO
    ),
    max_staleness: int = typer.Option(
        0,
        min=0,
        help="Rounds that an update may be late and still count, discounted (FedBuff). 0: none.",
        rich_help_panel=WHO,
    ),
    max_norm: float = typer.Option(
        1000.0, min=1e-9, help="L2 norm above which an update is refused.", rich_help_panel=WHO
    ),
    max_samples: int = typer.Option(
        1_000_000, min=1, help="Samples above which an update is refused.", rich_help_panel=WHO
    ),
    audit: bool = typer.Option(False, help="Keep every update, so that `replay` can check the run."),
    rule: Rule = typer.Option(Rule.MEAN, help="mean, or one that withstands hostile updates.", rich_help_panel=HOW),
    trim: float = typer.Option(
        0.1, min=0, max=0.499, help="Share cut off at each end by trimmed-mean.", rich_help_panel=HOW
    ),
    clip: float | None = typer.Option(
        None, min=1e-9, help="L2 norm that updates are scaled down to.", rich_help_panel=HOW
    ),
    optimizer: Optimizer = typer.Option(
        Optimizer.FEDAVG, "--server-optimizer", help="What is done with the combined update.", rich_help_panel=HOW
    ),
    server_learning_rate: float = typer.Option(1.0, min=1e-9, rich_help_panel=HOW),
    encoding: Encoding = typer.Option(
        Encoding.FP32, help="How updates travel; int8 with error feedback.", rich_help_panel=HOW
    ),
    dp_noise: float | None = typer.Option(
        None,
        min=1e-9,
        help="Noise multiplier of DP-FedAvg; needs --dp-clip. Default: no privacy of this kind.",
        rich_help_panel=SECRET,
    ),
    dp_clip: float | None = typer.Option(
        None, min=1e-9, help="L2 norm that devices clip their updates to.", rich_help_panel=SECRET
    ),
    delta: float = typer.Option(1e-5, min=1e-12, max=0.1, help="δ that ε is reported for.", rich_help_panel=SECRET),
) -> None:
    """Coordinate one run until it is finished. The same command goes on with a run that was interrupted."""
    opened = Bundle.load(bundle)
    opened.verify()
    level = max_level or opened.manifest.levels
    if level > opened.manifest.levels:
        raise ConfigError(f"--max-level {level}: the bundle has levels up to {opened.manifest.levels}")
    if head is Head.ZERO_SHOT and opened.zero_shot() is None:
        raise ConfigError(
            f"--head zero-shot: the bundle of {opened.manifest.model} has no such head; build one of clip-vit-b16 with "
            "its weights, or choose class-means"
        )
    settings: dict[str, Any] = {
        "run": check_name("run", run),
        "devices": devices,
        "min_updates": min_updates,
        "enough": enough,
        "selection": selection,
        "fraction": fraction,
        "max_staleness": max_staleness,
        "join_timeout": join_timeout,
        "round_timeout": round_timeout,
        "max_repeats": max_repeats,
        "max_norm": max_norm,
        "max_samples": max_samples,
        "stage1_rounds": stage1_rounds,
        "stage2_rounds": stage2_rounds,
        "baseline": baseline,
        "head": head,
        "stage1": Training(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed),
        "stage2": Training(epochs=1, batch_size=batch_size, learning_rate=local_learning_rate, seed=seed),
        "stage1_sal": sal_of(sal, window=3, min_gain=sal_min_gain, max_level=level),
        "stage2_sal": sal_of(sal, window=2, min_gain=sal_min_gain / 2, max_level=level),
        "aggregation": Aggregation(
            rule=rule, trim=trim, clip=clip, optimizer=optimizer, learning_rate=server_learning_rate
        ),
        "encoding": encoding,
        "privacy": _privacy(dp_noise, dp_clip, min_updates),
        "delta": delta,
        "seed": seed,
        "audit": audit,
    }
    try:
        config = RunConfig(**settings)
    except ValidationError as error:
        raise ConfigError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
    store = open_run(out or Path("runs") / run / "server", config, opened)
    _coordinate(store, opened, broker, serve, identity, insecure)


@app.command()
def resume(
    out: Path = OUT,
    broker: str = BROKER,
    serve: str | None = SERVE,
    identity: Path | None = IDENTITY,
    insecure: bool = INSECURE,
) -> None:
    """Go on with a run that was interrupted, with the settings it was started with."""
    store = RunStore(out)
    bundle = open_bundle(store)
    bundle.verify()
    _coordinate(store, bundle, broker, serve, identity, insecure)


def _coordinate(
    store: RunStore, bundle: Bundle, broker: str, serve: str | None, identity: Path | None, insecure: bool
) -> None:
    set_up_log()
    run = store.origin.config.run
    if store.ended is not None:
        console.print(f"run {run!r} at {store.folder} has ended ({store.ended}); for a new one choose another --out")
    elif store.checkpoint() is not None:
        console.print(f"going on with run {run!r} at {store.folder}")
    artifacts = BundleServer(bundle.root, serve, identity, insecure) if serve else None
    try:
        run_server(store, bundle, broker, artifacts.url if artifacts else "", identity, insecure)
    finally:
        if artifacts:
            artifacts.close()
    console.print("run finished")


def _privacy(noise: float | None, clip: float | None, shares: int) -> Privacy | None:
    if (noise is None) != (clip is None):
        raise ConfigError("--dp-noise and --dp-clip go together")
    return None if noise is None or clip is None else Privacy(clip=clip, noise_multiplier=noise, shares=shares)


for command in (status, rounds, export, replay):
    app.command()(command)


if __name__ == "__main__":
    app()
