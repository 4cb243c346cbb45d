"""python -m benchmarks.epoch: the local rounds of a device, against the same rounds in torch + PEFT.

New images, rounds of E epochs with one change of level, evaluation on held-out images after each round. torch has no
levels, so its epochs all take the same time. Only some are run, with one evaluation, and the output says how many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from benchmarks.local_rounds import Seconds, Setting
from benchmarks.machine import describe_machine
from benchmarks.step import bundle_of
from fedfmsl.common.cli import application
from fedfmsl.errors import RunError
from fedfmsl.protocol.bundle import Bundle

SIDE = 256  # pixels of the random images, before resizing
TORCH = {"torch": "torch + PEFT, fp32", "torch-bf16": "torch + PEFT, bf16"}  # sides of `benchmarks.local_rounds`

app = application()


@app.command()
def epoch(
    model: str = typer.Option("vit-b16", help="As for export.build."),
    weights: str | None = typer.Option("random", help="As for export.build."),
    bundle: list[Path] = typer.Option(
        [], help="Bundles of the model; may be repeated. Default: fp32 and int8, built once."
    ),
    images: int = typer.Option(200, min=5),
    levels: str = typer.Option("1,1,1,2,2", help="The level of each round."),
    epochs: int = typer.Option(2, min=1, help="Local epochs of a round."),
    batch: int = typer.Option(16, min=1),
    torch_epochs: int = typer.Option(1, min=1, help="Epochs that torch runs; their time is scaled to all."),
    threads: int = typer.Option(0, min=0, help="0: one per core."),
    seed: int = typer.Option(0),
    out: Path | None = typer.Option(None, "--json", help="File to write the measurements to."),
) -> None:
    """Measure a device's local rounds, against torch + PEFT."""
    folders = bundle or [bundle_of(model, weights, precision) for precision in ("fp32", "int8")]
    rounds = tuple(int(level) for level in levels.split(","))
    cores = threads or os.cpu_count() or 1
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "images"
        write_images(photos, images, seed)
        for index, root in enumerate(folders):
            scratch = str(Path(folder) / f"cache-{index}")
            common = (model, weights, str(photos), scratch)
            ours = _run("edge", Setting(str(root), *common, rounds, epochs, batch, cores, seed))
            results[f"edge, {Bundle.load(root).manifest.precision}"] = _row(ours, 1.0, 1.0)
        for side, name in TORCH.items():
            theirs = _run(side, Setting(str(folders[0]), *common, rounds[:1], torch_epochs, batch, cores, seed))
            results[name] = _row(theirs, len(rounds) * epochs / torch_epochs, len(rounds))
    totals = [results[name]["total"] for name in TORCH.values()]
    machine = describe_machine(cores)
    print(f"{machine['processor']}, {machine['features']}, without {machine['missing_features']}")
    print(f"{images} images, {len(rounds)} rounds of {epochs} epochs at levels {levels}; ", end="")
    print(f"torch ran {torch_epochs} of {len(rounds) * epochs} epochs and one evaluation, scaled to all\n")
    print("| | features, s | training, s | evaluation, s | total, s | × torch fp32 | × best torch | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in results.items():
        row["times_faster"], row["times_best_torch"] = totals[0] / row["total"], min(totals) / row["total"]
        parts = " | ".join(f"{row[part]:.1f}" for part in ("features", "training", "evaluation", "total"))
        ratios = f"{row['times_faster']:.1f} | {row['times_best_torch']:.1f}"
        print(f"| {name} | {parts} | {ratios} | {row['peak_rss_mb']:.0f} |")
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n")


def write_images(folder: Path, count: int, seed: int) -> None:
    """Random JPEG files: only the time that they take matters."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for index in range(count):
        coarse = rng.integers(0, 256, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(folder / f"{index:05}.jpg")


def _run(side: str, setting: Setting) -> Seconds:
    command = [sys.executable, "-m", "benchmarks.local_rounds", side, json.dumps(asdict(setting))]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise RunError(f"{side} ended early; see its output above")
    return Seconds(**json.loads(result.stdout.splitlines()[-1]))


def _row(spent: Seconds, training: float, evaluation: float) -> dict[str, float]:
    """`training`, `evaluation`: factors from what was run to all rounds."""
    row = {
        "features": spent.features,
        "training": spent.training * training,
        "evaluation": spent.evaluation * evaluation,
        "peak_rss_mb": spent.peak_rss_mb,
    }
    return {**row, "total": row["features"] + row["training"] + row["evaluation"]}


if __name__ == "__main__":
    app()
