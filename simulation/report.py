"""Writes what a simulation found: tables, charts, report.html, and the best setting as a configuration for a server."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedfmsl.common.cli import console
from fedfmsl.common.files import write_atomically
from simulation.charts import labels_by_device, own_against_novel
from simulation.methods.base import stage_rounds
from simulation.methods.fedfmsl import FedFMSL
from simulation.results import Result, as_csv, as_markdown
from simulation.settings import SimulationSettings

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · FedFMSL Edge</title>
<style>
body {{ margin: 0 auto; max-width: 1200px; padding: 1.5rem 1rem 3rem; color: #222;
  font: 16px/1.5 system-ui, sans-serif }}
img {{ max-width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }}
th, td {{ padding: .35rem .8rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #e8e8e8 }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>{summary}</p>
{charts}
<div class="wide">{table}</div>
</body>
</html>
"""


def write_report(
    folder: Path,
    results: Sequence[Result],
    settings: SimulationSettings,
    classes: Sequence[str],
    label_counts: Callable[[], NDArray[np.int64]],
) -> None:
    """Writes results.csv, results.md, charts, report.html, and server.toml if FedFMSL was run. Prints their paths."""
    table = as_markdown(results)
    images = {"labels.svg": labels_by_device(label_counts(), classes), "accuracy.svg": own_against_novel(results)}
    charts = {name: svg for name, svg in images.items() if svg is not None}
    files = {"results.csv": as_csv(results).encode(), "results.md": table.encode(), **charts}
    files["report.html"] = _page(settings, table, charts).encode()
    server = server_settings(results, settings)
    if server:
        files["server.toml"] = server.encode()
    for name, data in files.items():
        write_atomically(folder / name, data)
    console.print(table)
    console.print(f"report     {folder / 'report.html'}")
    if server:
        console.print(f"settings   {folder / 'server.toml'}, for python -m trainer_server start --config")


def server_settings(results: Sequence[Result], settings: SimulationSettings) -> str:
    """A configuration of the server: that of FedFMSL with the best held-out accuracy, the mean over all α and seeds. ""
    if it was not run."""
    name = FedFMSL.name
    by_rate: dict[float, list[float]] = {}
    for result in results:
        if result["method"] == name:
            by_rate.setdefault(result["learning_rate"], []).append(result["held_out"][name])
    if not by_rate:
        return ""
    scores = {rate: statistics.mean(accuracies) for rate, accuracies in by_rate.items()}
    best = max(scores, key=scores.__getitem__)
    stage1, stage2 = stage_rounds(settings.rounds)
    lines = [
        f"# The best of {len(scores)} learning rates in a simulation: held-out accuracy {scores[best]:.3f}.",
        f'run = "{settings.name}"',
        f'bundle = "{settings.bundle.resolve()}"',
        f"devices = {settings.devices}",
        f"stage1_rounds = {stage1}",
        f"stage2_rounds = {stage2}",
        f"epochs = {settings.epochs}",
        f"batch_size = {settings.batch_size}",
        f"learning_rate = {best!r}",
        *([f"max_level = {settings.max_level}"] if settings.max_level else []),
        *(['select = "random"', f"fraction = {settings.fraction!r}"] if settings.fraction < 1 else []),
    ]
    return "\n".join(lines) + "\n"


def _page(settings: SimulationSettings, table: str, charts: dict[str, bytes]) -> str:
    images = [f'<img src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">' for svg in charts.values()]
    head, _, *rows = [line.strip("|\n ").split(" | ") for line in table.splitlines()]
    cells = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    summary = (
        f"{settings.devices} devices · {settings.rounds} rounds · partition {settings.partition.value} · share of "
        f"devices per round {settings.fraction:g} · {settings.seeds} seed{'s' if settings.seeds > 1 else ''}"
    )
    return _PAGE.format(
        name=html.escape(settings.name),
        summary=html.escape(summary),
        charts="\n".join(images),
        table=f"<table>{''.join(cells)}</table>",
    )
